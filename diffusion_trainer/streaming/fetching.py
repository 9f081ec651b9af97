"""Brings a shard, a piece of one or a file beside it onto this machine, and judges what came."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from isal import isal_zlib

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.index import CHECKSUMS, OFFSETS, SIZES, Shard
from diffusion_trainer.streaming.remote import Gone, NoRange, Remote, TooMuch
from diffusion_trainer.streaming.retries import Retries, Sick, Twice
from diffusion_trainer.streaming.stores import stale
from diffusion_trainer.streaming.tar import BLOCK, is_tar
from diffusion_trainer.streaming.urls import located

SIDECARS: Mapping[str, tuple[int, int]] = {
    OFFSETS: (8, 8),
    CHECKSUMS: (4, 0),
    SIZES: (8, 0),
}  # bytes a sample, and more
PAGES = (b"<!doctype", b"<html", b"<?xml", b"{")  # how the messages of proxies and stores begin
CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """What is fetched at once: `size` bytes of a shard from `first` on (None: all of it), or a file beside it.

    again: because what came before, or has lain in the cache, is not what was indexed: an entry of its own.
    """

    shard: Shard
    size: int
    first: int | None = None
    suffix: str = ""
    again: bool = False

    @classmethod
    def sidecar(cls, shard: Shard, suffix: str) -> "Part":
        each, more = SIDECARS[suffix]
        return cls(shard, each * shard.samples + more, suffix=suffix)

    @cached_property
    def url(self) -> str:
        place = located(self.shard.url)
        return place.beside(place.name + self.suffix)

    @property
    def name(self) -> str:
        """In a cache: 32 hexadecimal digits that differ for shards of one name that are not the same."""
        key = (self.url, self.shard.size, self.shard.crc32, self.first, self.size, self.crc32)
        return blake2b(repr((*key, "again") if self.again else key).encode(), digest_size=16).hexdigest()

    @property
    def crc32(self) -> int | None:
        """Of its bytes, where the index has it."""
        if self.suffix:
            return self.shard.own(self.suffix)
        return self.shard.crc32 if self.first is None else None

    @property
    def ends_shard(self) -> bool:
        return self.first is not None and self.first + self.size == self.shard.size


class Came(NamedTuple):
    """What a request brought."""

    size: int
    crc32: int
    head: bytes


@dataclass
class Attempt:
    """Fetches a part into a file. Called again, it remembers what came before.

    Returns once the file holds what the index says, or what the store has instead: fewer or other bytes, a damaged
    shard, whose whole samples can be used. More bytes, a page of HTML, or another index file, are never taken for it.
    """

    remote: Remote
    part: Part
    path: Path
    twice: Twice = field(default_factory=Twice)

    def __call__(self) -> None:
        try:
            came = self._receive()
        except Gone as gone:
            self.twice(Gone, f"it is not there ({gone})")
            raise
        if came.size == self.part.size and self.part.crc32 in (None, came.crc32):
            return
        self._check_kind(came)
        said = f"{came.size} bytes with CRC-32 {came.crc32:08x} came, its index says {self._expected()}"
        self.twice(came, said)
        if came.size > self.part.size or self.part.suffix:
            raise self._misfit(came)
        self._check_end(came)

    def _receive(self) -> Came:
        part = self.part
        if part.first is None:
            try:
                self.remote.get(part.url, self.path, part.size)
            except TooMuch:
                head = _measured(self.path).head or self.remote.cat(part.url, 0, BLOCK)  # gcsfs removes what it leaves
                return Came(part.size + 1, 0, head)
            return _measured(self.path)
        # One byte more than the shard has, if it is as its index says.
        data = self._piece(part.first, part.first + part.size + part.ends_shard)
        self.path.write_bytes(data)
        return Came(len(data), isal_zlib.crc32(data), data[:BLOCK])

    def _piece(self, first: int, last: int) -> bytes:
        try:
            return self.remote.cat(self.part.url, first, last)
        except NoRange:
            size = self.remote.size(self.part.url)
            if size is None or size > first:
                raise
            return b""

    def _check_kind(self, came: Came) -> None:
        part = self.part
        if came.size == part.size:
            return
        inside = part.first or part.suffix  # of which nobody knows how it should begin
        if came.head.lstrip().lower().startswith(PAGES) if inside else not is_tar(came.head):
            raise Sick(f"no tar: {came.size} bytes came that begin with {came.head[:40]!r}")

    def _check_end(self, came: Came) -> None:
        """A short answer is the whole truth only if the object itself is short."""
        if came.size < self.part.size:
            size, first = self.remote.size(self.part.url), self.part.first or 0
            if size is not None and size != first + came.size and (came.size or size > first):
                raise Sick(f"{came.size} bytes came where the object has {size - first}")

    def _expected(self) -> str:
        crc32 = self.part.crc32
        return f"{self.part.size}" + ("" if crc32 is None else f" with {crc32:08x}")

    def _misfit(self, came: Came) -> UserError:
        if self.part.first is not None and came.size > self.part.size + self.part.ends_shard:
            return UserError(
                f"{self.part.url}: the store sends more than the range it was asked for; "
                "fetch whole shards instead: piece_bytes=null"
            )
        return stale(self.part.shard)


def fetch(remote: Remote, retries: Retries, part: Part, path: Path) -> None:
    """Fills the file with the part; Gone, UserError, or OSError if this machine's disk is full."""
    retries(part.url, Attempt(remote, part, path))


def _measured(path: Path) -> Came:
    size, crc32, head = 0, 0, b""
    if path.exists():
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                head = head or data[:BLOCK]
                size, crc32 = size + len(data), isal_zlib.crc32(data, crc32)
    return Came(size, crc32, head)
