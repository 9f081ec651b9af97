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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isal import isal_zlib

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.locks import remove_left, replace_file
from diffusion_trainer.streaming.tar import BLOCK
from diffusion_trainer.streaming.urls import PIPE

INDEX = "index.json"
OFFSETS, CHECKSUMS, SIZES = ".idx", ".crc", ".size"
KIND = {"__kind__": "wids-shard-index-v1", "wids_version": 1}
MAX_SHARD = 1 << 40  # bytes that one may have
# What no file beside an index has in its name: half of a surrogate, which JSON may have, a folder, the end of a string
# of C, and at its beginning what makes it a command.
_ELSEWHERE = re.compile(f"[\ud800-\udfff/\0]|^{PIPE}", re.MULTILINE)
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
    """Of a file beside the index, and of no other place or command."""
    if not isinstance(url, str) or _ELSEWHERE.search(url) or url in ("", ".", ".."):
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
    if _ELSEWHERE.search("\n".join(names)) or not {"", ".", ".."}.isdisjoint(names):
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
