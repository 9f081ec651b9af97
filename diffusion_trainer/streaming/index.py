"""The index of shards: how many samples each has, where they lie, and what their bytes sum to.

Next to the tars stand `index.json` (wids' layout: one entry a shard), and for each shard X.tar

    X.tar.idx    n + 1 byte offsets, little-endian uint64 (Megatron-Energon's layout): sample i is bytes [o_i, o_i+1)
    X.tar.crc    n CRC-32 of these bytes, little-endian uint32
    X.tar.size   where aspect buckets are wanted: n heights and widths of the images, little-endian uint32 (0: unknown)
"""

import fcntl
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal import isal_zlib

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.damage import BadArchive, Damage, Truncated
from diffusion_trainer.streaming.locks import remove_left, replace_file
from diffusion_trainer.streaming.tar import BLOCK, entries, key_and_extension

INDEX = "index.json"
OFFSETS, CHECKSUMS, SIZES = ".idx", ".crc", ".size"
KIND = {"__kind__": "wids-shard-index-v1", "wids_version": 1}
PIECE = 1 << 22  # bytes read at a time
MAX_SHARD = 1 << 40  # bytes that one may have
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate, which JSON may have and no file's name
MAX_CRC32 = (1 << 32) - 1
OWN = ("offsets", "checksums", "sizes")  # CRC-32s of the files beside a shard
LARGEST = {  # of the numbers in an entry, as `Shard` has them in order
    "nsamples": MAX_SHARD // BLOCK,
    "filesize": MAX_SHARD,
    **dict.fromkeys(("crc32", *OWN), MAX_CRC32),
}


@dataclass(frozen=True)
class Shard:
    url: str  # or a local path
    samples: int
    size: int  # bytes of the tar
    crc32: int  # of the whole tar
    offsets: int | None = None  # CRC-32 of the .idx file: where the samples are; None: not known
    checksums: int | None = None  # CRC-32 of the .crc file: which bytes they had
    sizes: int | None = None  # CRC-32 of the .size file; None: there is none

    def own(self, suffix: str) -> int | None:
        """CRC-32 of the sidecar, as far as that is known."""
        return {OFFSETS: self.offsets, CHECKSUMS: self.checksums, SIZES: self.sizes}[suffix]

    def fits(self, suffix: str, data: bytes) -> bool:
        """Whether the bytes of the sidecar are those that belong to this index, as far as that is known."""
        return self.own(suffix) in (None, isal_zlib.crc32(data))


class Scan(NamedTuple):
    """What one pass over a tar finds."""

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
    except (BadArchive, Truncated) as damage:
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


def write_index(folder: Path, shards: Iterable[Shard]) -> None:
    """Adds the shards (their urls are names in the folder) to its index.json, or replaces their entries."""
    path = folder / INDEX
    with locked(folder):
        remove_left(folder)
        known = read_index(path) if path.exists() else ()
        every = {shard.url: shard for shard in (*known, *shards)}
        replace_file(path, serialized(every.values()))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time changes the folder's index."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def serialized(shards: Iterable[Shard]) -> bytes:
    """As index.json."""
    lines = ",\n".join(json.dumps(entry_of(s)) for s in sorted(shards, key=lambda s: s.url))
    return f'{json.dumps(KIND)[:-1]}, "shardlist": [\n{lines}\n]}}\n'.encode()


def entry_of(shard: Shard) -> dict[str, Any]:
    entry = {"url": shard.url, "nsamples": shard.samples, "filesize": shard.size, "crc32": shard.crc32}
    return entry | {key: crc32 for key in OWN if (crc32 := getattr(shard, key)) is not None}


def shard_of(entry: Mapping[str, Any]) -> Shard:
    """KeyError, TypeError or ValueError for what is no entry: who wrote it may be a stranger."""
    name, size = _name(entry["url"]), _whole(entry, "filesize", MAX_SHARD)
    samples = _whole(entry, "nsamples", size // BLOCK)  # each has a header at least
    own = (_whole(entry, k, MAX_CRC32) if entry.get(k) is not None else None for k in OWN)
    return Shard(name, samples, size, _whole(entry, "crc32", MAX_CRC32), *own)


def _whole(entry: Mapping[str, Any], key: str, most: int) -> int:
    value = entry[key]
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{key} is {repr(value)[:40]}, not a whole number from 0 to {most}")
    return value


def _name(url: Any) -> str:
    """Of a file beside the index, and of no other place."""
    if not isinstance(url, str) or _HALF.search(url) or "/" in url or "\0" in url or url in ("", ".", ".."):
        raise ValueError(f"it names {repr(url)[:200]}, which is not beside it; an index holds the names of its folder")
    return url


def _shards(entries: Sequence[Mapping[str, Any]], before: str, after: str) -> list[Shard]:
    """Column by column, what a hundred thousand entries one by one would take seconds for; these find the mistakes."""
    columns = [[entry.get(key) for entry in entries] for key in ("url", *LARGEST)]
    if columns[-1].count(None) == len(entries):
        columns.pop()  # most have no sizes
    if _is_plain(*columns):
        found = list(map(Shard, [f"{before}{name}{after}" for name in columns[0]], *columns[1:]))
    else:
        found = [replace(shard, url=f"{before}{shard.url}{after}") for shard in map(shard_of, entries)]
    if len({shard.url for shard in found}) < len(found):
        raise ValueError("it names a shard twice")
    return found


def _is_plain(names: Sequence, *numbers: Sequence) -> bool:
    """Whether no entry lacks anything, and `shard_of` would take all of them as they are."""
    if {type(name) for name in names} - {str} or {type(n) for column in numbers for n in column} - {int}:
        return False
    letters = "".join(names)
    if _HALF.search(letters) or "/" in letters or "\0" in letters or not {"", ".", ".."}.isdisjoint(names):
        return False
    in_bounds = (not c or (min(c) >= 0 and max(c) <= most) for c, most in zip(numbers, LARGEST.values(), strict=False))
    return all(in_bounds) and all(n <= size // BLOCK for n, size in zip(*numbers[:2], strict=True))


def read_index(path: Path) -> list[Shard]:
    return parse_index(path.read_bytes(), str(path))


def parse_index(data: bytes, where: str, before: str = "", after: str = "") -> list[Shard]:
    """The shards of an index.json, their urls being the names in it between these; UserError if it is none."""
    try:
        return _shards(json.loads(data)["shardlist"], before, after)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # last: thousands of brackets
        raise UserError(
            f"{where} is no index of shards ({type(error).__name__}: {error}); make it anew: diffusion-trainer index "
            "<shards> again=true"
        ) from error
