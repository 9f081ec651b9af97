"""What one pass over a tar finds: where its samples are, what they sum to, and where it is damaged."""

import os
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from diffusion_trainer.streaming.damage import BadArchive, Damage, Truncated
from diffusion_trainer.streaming.index import CHECKSUMS, OFFSETS, SIZES, Shard
from diffusion_trainer.streaming.locks import replace_file
from diffusion_trainer.streaming.tar import BLOCK, entries, key_and_extension

PIECE = 1 << 22  # bytes read at a time


class Scan(NamedTuple):
    offsets: np.ndarray  # (n + 1,) uint64
    checksums: np.ndarray  # (n,) uint32
    size: int
    crc32: int
    fields: Mapping[tuple[str, ...], int]  # how many samples have these extensions
    damage: Damage | None  # why it ended before the tar's end mark; the samples are those before
    sizes: np.ndarray | None = None  # (n, 2) uint32, height and width of the images

    def sidecars(self) -> dict[str, bytes]:
        """Of the files beside the tar, by their suffix."""
        found = {OFFSETS: self.offsets, CHECKSUMS: self.checksums, SIZES: self.sizes}
        return {suffix: array.tobytes() for suffix, array in found.items() if array is not None}

    def shard(self, url: str) -> Shard:
        own = (isal_zlib.crc32(data) for data in self.sidecars().values())
        return Shard(url, len(self.checksums), self.size, self.crc32, *own)


class _File:
    """A file as `members` reads it: positional, so that a file cut meanwhile is an error and not a bus error."""

    def __init__(self, descriptor: int):
        self.descriptor, self.size = descriptor, os.fstat(descriptor).st_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, piece: slice) -> bytes:
        return os.pread(self.descriptor, piece.stop - piece.start, piece.start)

    def crc32(self, first: int, last: int) -> int:
        value = 0
        for at in range(first, last, PIECE):
            piece = self[at : min(at + PIECE, last)]
            if len(piece) < min(PIECE, last - at):
                raise Truncated(f"it became shorter than {last} bytes while it was read")
            value = isal_zlib.crc32(piece, value)
        return value


def scan(path: Path) -> Scan:
    """Reads a tar once. What is damaged ends the samples and stands in `damage`; OSError as `open` raises it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        file = _File(descriptor)
        offsets, fields, damage = _samples(file)
        try:
            checksums = [file.crc32(a, b) for a, b in pairwise(offsets)]
            whole = file.crc32(0, len(file))
        except Truncated as shrunk:
            offsets, checksums, whole, fields, damage = [0], [], 0, {}, shrunk
        return Scan(np.array(offsets, "<u8"), np.array(checksums, "<u4"), len(file), whole, fields, damage)
    finally:
        os.close(descriptor)


def _samples(file: _File) -> tuple[list[int], Mapping, Damage | None]:
    """Offsets of the whole samples and of the end of the last one, their extensions, and what ended them early."""
    offsets: list[int] = []
    fields: Counter[tuple[str, ...]] = Counter()
    seen: set[str] = set()
    key, extensions, end = None, [], 0
    try:
        for entry, regular in entries(file, checked=True):
            found = key_and_extension(entry.name) if regular else None
            end = entry.end
            if found is None:
                continue
            if found[0] == key:
                if found[1] in extensions:
                    raise BadArchive(f"{entry.name} is in it twice")
                extensions.append(found[1])
                continue
            if found[0] in seen:
                raise BadArchive(f"the members of {found[0]} do not lie together; write it sorted (tar --sort=name)")
            if key is not None:
                fields[tuple(sorted(extensions))] += 1
            key, extensions = found[0], [found[1]]
            seen.add(key)
            offsets.append(entry.start)
        _check_end(file, end)
    except Damage as damage:
        return offsets or [0], fields, damage  # the sample that was being read may lack members: it is left out
    if key is not None:
        fields[tuple(sorted(extensions))] += 1
    return [*offsets, end], fields, None


def _check_end(file: _File, end: int) -> None:
    """tarfile and webdataset take a tar cut at a member's border for a whole one, and skip what was joined to one."""
    if len(file) < end + BLOCK:
        raise Truncated("it has no end mark")
    for at in range(end, len(file), PIECE):
        if any(file[at : at + PIECE]):
            raise BadArchive("there are bytes behind its last member (tars joined by cat?)")


def write_sidecars(path: Path, found: Scan) -> None:
    """What is there of another scan goes."""
    made = found.sidecars()
    for suffix in (OFFSETS, CHECKSUMS, SIZES):
        if suffix in made:
            replace_file(Path(f"{path}{suffix}"), made[suffix])
        else:
            Path(f"{path}{suffix}").unlink(missing_ok=True)
