"""Writes WebDataset shards: all of them or none."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from webdataset import ShardWriter


def write_shards(samples: Iterable[Mapping], folder: Path, name: str, samples_per_shard: int) -> list[Path]:
    """<folder>/<name>-000000.tar and on; a sample is {"__key__": ..., extension: bytes}. Replaces shards of that name.

    The bytes depend on the samples alone (no time, no user). The tars are written beside and moved when whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    writer = ShardWriter(
        str(part / f"{name}-%06d.tar"), maxcount=samples_per_shard, maxsize=1e15, mtime=0, user="", group="", verbose=0
    )
    with writer:
        for sample in samples:
            writer.write(dict(sample))
    for old in folder.glob(f"{name}-*.tar"):
        old.unlink()
    paths = [shard.rename(folder / shard.name) for shard in sorted(part.glob("*.tar"))]
    part.rmdir()
    return paths
