"""Samples of shards that are read once, from their start, as they come: from URLs, commands or files, without index."""

import gzip
import io
import zlib
from collections.abc import Collection, Iterator
from contextlib import closing
from typing import BinaryIO

from isal import isal_zlib

from diffusion_trainer.streaming.damage import BadArchive, Damage, TooLarge, Truncated
from diffusion_trainer.streaming.index import MAX_SHARD
from diffusion_trainer.streaming.remote import CHUNK, Gone, Remote
from diffusion_trainer.streaming.retries import Retries, Sick, Twice
from diffusion_trainer.streaming.tar import BLOCK, Member, is_tar, key_and_extension, members
from diffusion_trainer.streaming.urls import is_url

GZIP = (".tar.gz", ".tgz")
GZIP_MAGIC = b"\x1f\x8b"


class Stream(io.RawIOBase):
    """An object from its start to its end: where it breaks off it is opened again, and what was read before is passed
    over. What comes from a URL is a tar, or compressed, or a message of somebody who is ill.

    Reading raises PassingError, UserError, or Gone if there is no such object.
    """

    def __init__(self, remote: Remote, retries: Retries, url: str):
        self.remote, self.retries, self.url = remote, retries, url
        self._twice = Twice()
        self._pieces: Iterator[bytes] | None = None
        self._left = memoryview(b"")  # of what came, not yet read
        self._at, self._crc32 = 0, 0  # of all that came

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:
        if not self._left:
            self._left = memoryview(self.retries(self.url, self._attempt))
            self._at, self._crc32 = self._at + len(self._left), isal_zlib.crc32(self._left, self._crc32)
        size = min(len(into), len(self._left))
        into[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        self._pieces = None  # which ends the transfer
        super().close()

    def _attempt(self) -> bytes:
        """What comes next; nothing at the end."""
        try:
            if self._pieces is None:
                self._pieces = self._again()
            if data := next(self._pieces, b""):
                return data
            self._check_end()
            return b""
        except BaseException as error:
            self._pieces = None
            if isinstance(error, Gone):
                self._twice(Gone, f"it is not there ({error})")
            raise

    def _again(self) -> Iterator[bytes]:
        """The pieces from where it broke off."""
        pieces, head = self.remote.stream(self.url), b""
        while len(head) < BLOCK and (data := next(pieces, b"")):
            head += data
        if head and is_url(self.url) and not (is_tar(head) or head.startswith(GZIP_MAGIC)):
            raise Sick(f"no tar: what came begins with {head[:40]!r}")
        passed, crc32 = 0, 0
        while passed < self._at and head:
            before = head[: self._at - passed]
            passed, crc32, head = passed + len(before), isal_zlib.crc32(before, crc32), head[len(before) :]
            head = head or next(pieces, b"")
        if (passed, crc32) != (self._at, self._crc32):
            raise Sick(f"what comes does not begin with the {self._at} bytes that came before")
        if head:
            yield head
        yield from pieces

    def _check_end(self) -> None:
        """No tar ends where its reader wants more. Whoever says honestly that he sends half of it does not tell that
        there is more, and who tells no size is asked once more."""
        size = self.remote.size(self.url)
        if size and size != self._at:
            raise Sick(f"{self._at} bytes came where the object has {size}")
        if size or not is_url(self.url):  # some servers say 0 of what they stream, and disks of what is no file
            return
        if size is None and not self._at:
            raise Sick("nothing came")
        self._twice((self._at, self._crc32), f"no more than {self._at} bytes came, and no end of the tar")


class _Forward:
    """A stream as `members` reads it: forward alone."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.at = stream, 0

    def __len__(self) -> int:
        return MAX_SHARD  # nobody knows

    def __getitem__(self, piece: slice) -> bytes:
        size = piece.stop - piece.start
        while self.at < piece.start and self._read(min(CHUNK, piece.start - self.at)):
            pass
        data = self._read(size)
        if len(data) < size:
            raise Truncated(f"it ends at byte {self.at}, without the empty blocks that end a tar")
        return data

    def _read(self, size: int) -> bytes:
        try:
            data = self.stream.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BadArchive(f"behind byte {self.at}: {error}") from error
        self.at += len(data)
        return data


def samples(
    remote: Remote, retries: Retries, url: str, wanted: Collection[str], at_most: int
) -> Iterator[tuple[str, dict[str, bytes | Damage]]]:
    """(key, extension -> bytes, or TooLarge) of each sample; of its members those alone whose extensions are wanted.

    Raises Damage at what ends the shard early, Gone if there is none, PassingError or UserError if it cannot be read.
    """
    with closing(Stream(remote, retries, url)) as raw:
        yield from _samples(_Forward(_opened(raw, url)), wanted, at_most)


def _opened(raw: Stream, url: str) -> BinaryIO:
    """Inflated where its name says so and it is: shards may be a stranger's, and a few of his bytes gigabytes."""
    stream = io.BufferedReader(raw, CHUNK)
    if not stream.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC):
        return stream
    if not url.endswith(GZIP):
        raise BadArchive(f"it is compressed, which its name does not say ({' or '.join(GZIP)})")
    return gzip.GzipFile(fileobj=stream)


def _samples(tar: _Forward, wanted: Collection[str], at_most: int) -> Iterator[tuple[str, dict[str, bytes | Damage]]]:
    key, sample, size = None, {}, 0  # what ends a shard early leaves out this one, which may lack members
    for member in members(tar, checked=True):
        found = key_and_extension(member.name)
        if found is None:
            continue
        if found[0] != key:
            if key is not None:
                yield key, sample
            key, sample, size = found[0], {}, 0
        if found[1] in sample:
            raise BadArchive(f"{member.name} is in it twice")
        if found[1] in wanted:
            size += member.size
            sample[found[1]] = _member(tar, member, size, at_most)
    if key is not None:
        yield key, sample


def _member(tar: _Forward, member: Member, size: int, at_most: int) -> bytes | Damage:
    if size > at_most:
        return TooLarge(f"it has {size} bytes or more, more than data.max_sample_bytes={at_most}")
    return tar[member.offset : member.offset + member.size]
