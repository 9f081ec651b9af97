"""Writes WebDataset shards with their index: all of them or none."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from secrets import token_hex

from webdataset import TarWriter

from diffusion_trainer.streaming.index import CHECKSUMS, INDEX, OFFSETS, SIZES, Shard, read_index, write_index
from diffusion_trainer.streaming.scanning import scan, write_sidecars


def write_shards(samples: Iterable[Mapping], folder: Path, name: str, samples_per_shard: int) -> list[Path]:
    """<folder>/<name>-000000.tar and on, and their index; a sample is {"__key__": ..., extension: bytes}. Replaces
    shards of that name.

    The bytes depend on the samples alone (no time, no user). The tars are written beside and moved when whole.
    """
    part = staging(folder, name)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shards = [
        write_shard(part / shard_name(name, k), piece) for k, piece in enumerate(_pieces(samples, samples_per_shard))
    ]
    publish(shards, part, folder, name)
    shutil.rmtree(part)
    return [folder / shard.url for shard in shards]


def staging(folder: Path, name: str) -> Path:
    """Where the shards of a set are until all of them are whole."""
    return folder / f".{name}.part"


def shard_name(name: str, k: int) -> str:
    return f"{name}-{k:06d}.tar"


def is_shard_of(name: str, file: str) -> bool:
    """Whether it is a tar of the set of that name (and not of train-large, if that is not the name)."""
    return re.fullmatch(rf"{re.escape(name)}-\d{{6,}}\.tar", file) is not None


def _pieces(samples: Iterable[Mapping], size: int) -> Iterator[Iterable[Mapping]]:
    """At least one; each must be used up before the next one is asked for."""
    rest = iter(samples)
    yield islice(rest, size)
    for first in rest:
        yield chain([first], islice(rest, size - 1))


def beside(path: Path) -> Path:
    """A file for what is to be moved to the path when it is whole; another one for every process of every machine."""
    return path.with_name(f".{path.name}.{token_hex(6)}.part")


def write_shard(path: Path, samples: Iterable[Mapping]) -> Shard:
    """A tar and its sidecars, on the disk when this returns; until then there is no file of that name.

    ValueError if readers would not see every sample: two with one key, members of one name, hidden keys.
    """
    part = beside(path)
    count = 0
    with part.open("wb") as file:
        with TarWriter(file, user="", group="", mtime=0) as tar:
            for count, sample in enumerate(samples, 1):  # noqa: B007
                tar.write(dict(sample))
        file.flush()
        os.fsync(file.fileno())
    found = scan(part)
    if found.damage is not None or len(found.checksums) != count:
        part.unlink()
        why = found.damage or "keys must differ, and their base names begin with neither a dot nor __"
        raise ValueError(f"{path.name}: {count} samples were written, {len(found.checksums)} can be read: {why}")
    write_sidecars(path, found)
    os.replace(part, path)
    return found.shard(path.name)


def publish(shards: Sequence[Shard], part: Path, folder: Path, name: str) -> None:
    """Moves the shards of `part` into the folder, in place of those it has of that name. The index comes last.

    After an interruption it may be called again, and several processes may at the same time, with the same shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _unlist(part, folder, name)
    new = {shard.url for shard in shards}
    for old in {file for file in os.listdir(folder) if is_shard_of(name, file)} - new:
        for suffix in ("", OFFSETS, CHECKSUMS, SIZES):
            (folder / f"{old}{suffix}").unlink(missing_ok=True)
    for shard in shards:
        (folder / f"{shard.url}{SIZES}").unlink(missing_ok=True)
        for suffix in (OFFSETS, CHECKSUMS, ""):
            _move(part / f"{shard.url}{suffix}", folder)
    write_index(folder, shards)


def _unlist(part: Path, folder: Path, name: str) -> None:
    """Takes the set out of the folder's index: from here to the end its shards may be old or new."""
    index = folder / INDEX
    listed = read_index(index) if index.exists() else []
    others = [shard for shard in listed if not is_shard_of(name, shard.url)]
    if len(others) == len(listed):
        return
    if others:
        part.mkdir(exist_ok=True)  # another process may have finished meanwhile
        write_index(part, others)
        os.replace(part / INDEX, index)
    else:
        index.unlink(missing_ok=True)


def _move(file: Path, folder: Path) -> None:
    """OSError unless it is there afterwards, moved by whomever."""
    try:
        os.replace(file, folder / file.name)
    except FileNotFoundError:
        (folder / file.name).stat()
