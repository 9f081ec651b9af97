"""Tar shards as one random-access list of samples: scanned once, then one read per field."""

import glob
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from diffusion_trainer.conventions import UserError


def find(patterns: str | Sequence[str]) -> list[Path]:
    """The shard files that local paths, globs (*) and braces ({000..007}) name; UserError if there is none."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    paths = []
    for pattern in patterns:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise UserError(f"shards: {pattern} is not a local path; copy the shards to a disk of this machine")
        for name in expand_urls(pattern):
            found = sorted(glob.glob(name))
            if Path(name).is_dir():
                raise UserError(f"shards: {name} is a folder; name its files: {name.rstrip('/')}/*.tar")
            if not found:
                raise UserError(
                    f"shards: no file matches {name} (looked in {Path(name).absolute().parent}). "
                    "Write them first (for the digits: python data/digits.py) or say where they are: data.shards=..."
                )
            paths += [Path(p) for p in found]
    return paths


def scan(path: Path, fields: Mapping[str, Sequence[str]]) -> np.ndarray:
    """(samples, fields, 2) int64: offset and size of each field's bytes in the tar.

    fields: name -> the extensions that may hold it. UserError names the shard and what is wrong with it: not a tar,
    truncated, empty, or a sample that lacks a field.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if member.isfile() and key is not None and not os.path.basename(key).startswith("__"):
                    fields_of = samples.setdefault(key, {})
                    if extension.lower() in fields_of:
                        raise UserError(f"shard {path}: {member.name} is in it twice; keys must be unique in a shard")
                    fields_of[extension.lower()] = (member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"shard {path} is damaged ({error}); write or copy it again") from error
    if not samples:
        raise UserError(f"shard {path} is empty: it has no samples; write it again or leave it out of data.shards")
    if not _ends(path, end):
        # tarfile takes a tar cut at a member's border for a whole one: samples would be missing without a word.
        raise UserError(f"shard {path} is truncated: the tar has no end mark; write or copy it again")
    return np.array([[_locate(path, key, s, *f) for f in fields.items()] for key, s in samples.items()], np.int64)


def _ends(path: Path, end: int) -> bool:
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    return len(block) == tarfile.BLOCKSIZE and not any(block)


def _locate(path: Path, key: str, sample: Mapping, name: str, extensions: Sequence[str]) -> tuple[int, int]:
    for extension in extensions:
        if extension in sample:
            return sample[extension]
    raise UserError(
        f"shard {path}: sample {key} has no {name}: expected a member {key}.{' or .'.join(extensions)}, "
        f"found {', '.join('.' + e for e in sorted(sample))}"
    )


@dataclass
class Shards:
    """The samples of some shards. Reading is positional, so threads and forked workers may share one object."""

    paths: Sequence[Path]
    fields: Mapping[str, Sequence[str]]  # name -> extensions that may hold it
    _shard: np.ndarray = field(init=False, repr=False)  # (N,) number of the shard
    _where: np.ndarray = field(init=False, repr=False)  # (N, fields, 2) offset and size
    _files: dict[int, int] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        scans = [scan(path, self.fields) for path in self.paths]
        self._where = np.concatenate(scans)
        self._shard = np.repeat(np.arange(len(scans)), [len(s) for s in scans])

    def __len__(self) -> int:
        return len(self._shard)

    def read(self, i: int) -> dict[str, bytes]:
        """The bytes of each field of sample i."""
        return {name: self.read_field(i, name) for name in self.fields}

    def read_field(self, i: int, name: str) -> bytes:
        """The bytes of one field of sample i."""
        shard, (offset, size) = int(self._shard[i]), self._where[i, list(self.fields).index(name)].tolist()
        if shard not in self._files:
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], size, offset)
        if len(data) != size:
            raise UserError(f"{self.where(i)} ended early: it was changed after the run started; write it again")
        return data

    def where(self, i: int) -> str:
        return f"shard {self.paths[int(self._shard[i])]}, byte {int(self._where[i, 0, 0])}"
