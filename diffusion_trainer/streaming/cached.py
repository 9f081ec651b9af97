"""Shards at URLs, through a cache on this node."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec.asyn

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.damage import Truncated
from diffusion_trainer.streaming.fetching import Part
from diffusion_trainer.streaming.files import Files, part_of
from diffusion_trainer.streaming.files import pieces as pieces_of
from diffusion_trainer.streaming.index import CHECKSUMS, INDEX, OFFSETS, SIZES, Shard, parse_index
from diffusion_trainer.streaming.remote import WITNESSES, Gone, Remote, globbed, read
from diffusion_trainer.streaming.retries import AGAIN, Retries, Sick
from diffusion_trainer.streaming.stores import LocalStore, Store, content, is_glob, listing, matching, remedy
from diffusion_trainer.streaming.urls import Location, expanded, is_pipe, is_url, located


@dataclass
class CachedStore(Store):
    """Shards at http(s)://, s3://, gs://, file:// or whatever else fsspec opens; paths without :// are read in place.

    cache: a folder on a disk of the node (or /dev/shm), which its processes share; cache_bytes: its bound. index: a
    folder that has the index files, if they do not lie beside the shards.
    piece_bytes: null fetches whole shards; a number fetches the pieces of this size that samples are in.
    retries: of a request that fails, with waits uniform in [0, backoff_seconds 2^k), at most a minute each.
    timeout_seconds: a connection that sends nothing for so long has failed. storage_options: of fsspec's backend.
    allow_pipe: pipe: URLs run shell commands. steps_ahead: batches that are fetched before they are read.
    """

    cache: str
    cache_bytes: int
    index: str | None = None
    piece_bytes: int | None = None
    retries: int = 10
    backoff_seconds: float = 0.5
    timeout_seconds: float = 60.0
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    allow_pipe: bool = False
    steps_ahead: int = 16

    def __post_init__(self):
        if self.cache_bytes < 1 or self.steps_ahead < 0:
            raise ValueError("cache_bytes must be positive, steps_ahead not negative")
        if self.piece_bytes is not None and not 0 < self.piece_bytes <= self.cache_bytes:
            raise ValueError(f"piece_bytes={self.piece_bytes} must be positive and at most cache_bytes, or null")
        self._remote = Remote(self.timeout_seconds, self.storage_options, self.allow_pipe)
        self._retries = Retries(self.retries, self.backoff_seconds)
        self._local, self._opened = LocalStore(), None
        self._some: dict[str, list[str]] = {}  # folder -> the first of its shards

    def read(self, shard: Shard, offset: int, into: memoryview) -> None:
        if not is_url(shard.url):
            return self._local.read(shard, offset, into)
        try:
            return self._read(shard, offset, into)
        except (Truncated, OSError):  # perhaps of the entry alone
            self.read_again(shard, offset, into)

    def read_again(self, shard: Shard, offset: int, into: memoryview) -> None:
        """Pieces have no checksum of their own, and disks of nodes rot: fetched once more, it is believed."""
        if not is_url(shard.url):
            return
        with self._readable():
            self._read(shard, offset, into, again=True)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PassingError(f"data.store.cache={self.cache} cannot be read: {error}. {AGAIN}") from error

    def _read(self, shard: Shard, offset: int, into: memoryview, again: bool = False) -> None:
        end, done = min(offset + len(into), shard.size), 0
        for _, first, size in pieces_of(shard, offset, end, self.piece_bytes):
            descriptor, at = self._files.descriptor(shard, first, size, again), offset + done - first
            wanted = into[done : done + size - at]
            while wanted:
                count = os.preadv(descriptor, [wanted], at)
                if count == 0:
                    there = first + os.fstat(descriptor).st_size
                    raise Truncated(f"it has {there} bytes, its index says {shard.size}")
                wanted, at, done = wanted[count:], at + count, done + count
        if done < len(into):
            raise Truncated(f"its index says that it has {shard.size} bytes")

    def sidecar(self, shard: Shard, suffix: str) -> bytes:
        if not is_url(shard.url):
            return self._local.sidecar(shard, suffix)
        how = remedy(shard, suffix == SIZES)
        if self.index is not None:
            return content(f"{Path(self.index) / located(shard.url).name}{suffix}", f"{how} out={self.index}")
        part = Part.sidecar(shard, suffix)
        try:
            with suppress(OSError):  # perhaps of the entry alone
                if shard.fits(suffix, data := self._files.content(part)):
                    return data
            with self._readable():
                return self._files.content(replace(part, again=True))
        except Gone as gone:
            raise UserError(f"{part.url} is missing; make it: {how}") from gone

    def find(self, *patterns: str) -> list[Shard]:
        listed, indexes = listing(), {}
        found = [
            self._named(pattern, indexes) if is_url(pattern) else self._local.named(pattern, listed)
            for pattern in patterns
        ]
        return [shard for shards in found for shard in shards]

    def _named(self, pattern: str, indexes: dict[Location, dict[str, Shard]]) -> list[Shard]:
        """indexes: those that were read; more are added."""
        found = [shard for url in expanded(pattern) for shard in self._matching(url, indexes)]
        if self.piece_bytes is None:
            largest = max(found, key=lambda shard: shard.size)
            if largest.size > self.cache_bytes:
                raise UserError(
                    f"shard {largest.url} has {largest.size} bytes, more than data.store.cache_bytes="
                    f"{self.cache_bytes}; give more, or fetch pieces of shards: data.store.piece_bytes=4194304"
                )
        return found

    def _matching(self, url: str, indexes: dict[Location, dict[str, Shard]]) -> list[Shard]:
        """The index alone says which shards there are: http cannot list, and listing s3 takes minutes."""
        self._check_pipe(url)
        place, found = located(url), []
        for folder in self._folders(place):
            around = Location(place.before, folder, INDEX, place.after)
            listed = indexes.get(around)
            if listed is None:
                listed = indexes[around] = self._index(around)
                self._some[folder] = [around.beside(name) for name in sorted(listed)[:WITNESSES]]
            found += [listed[name] for name in matching(listed, place.name)]
        if not found:
            raise UserError(f"shards: no index names {url}; make it where the shards are: diffusion-trainer index")
        return found

    def _check_pipe(self, url: str) -> None:
        if is_pipe(url):
            if not self.allow_pipe:
                raise UserError(f"shards: {url} runs a shell command; set data.store.allow_pipe=true to have that")
            if self.piece_bytes is not None or is_glob(located(url).name):  # names of an index stay out of a shell
                raise UserError(f"shards: {url}: of a command, name whole shards (piece_bytes=null), no *")

    def _folders(self, place: Location) -> list[str]:
        if place.before or not is_glob(place.folder):
            return [place.folder]
        found = globbed(self._remote, self._retries, place.folder)
        return [f"{folder.rstrip('/')}/" for folder in found] or [place.folder]  # its name only looks like a pattern

    def _index(self, place: Location) -> dict[str, Shard]:
        """By their names, all shards of an index."""
        url, before = "".join(place), place.before + place.folder
        parse = partial(parse_index, before=before, after=place.after)
        if self.index is not None:
            listed = self._index_here(Path(self.index) / INDEX, parse)
        else:
            try:
                listed = read(self._remote, self._retries, url, lambda data: parse(_no_page(data), url))
            except Gone as gone:
                raise UserError(
                    f"shards: {url} is not there; make it (diffusion-trainer index), where the shards are, or in a "
                    "folder (out=...) for data.store.index"
                ) from gone
        return {shard.url[len(before) : len(shard.url) - len(place.after)]: shard for shard in listed}

    def _index_here(self, path: Path, parse: Callable[[bytes, str], list[Shard]]) -> list[Shard]:
        try:
            return parse(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(
                f"data.store.index: {path} cannot be read ({error.strerror}); diffusion-trainer index <shards> out=... "
                "writes it"
            ) from error

    def prefetch(self, pieces: Iterable[tuple[Shard, int, int]]) -> None:
        self._files.prefetch(
            part_of(piece) for span in pieces if is_url(span[0].url) for piece in pieces_of(*span, self.piece_bytes)
        )

    def prefetch_sidecars(self, shards: Iterable[Shard]) -> None:
        if self.index is None:
            there = [shard for shard in shards if is_url(shard.url)]
            self._files.prefetch(Part.sidecar(shard, suffix) for shard in there for suffix in (OFFSETS, CHECKSUMS))

    @property
    def _files(self) -> Files:
        """Of this process: a forked one shares nothing of it, but would share its locks and miss its threads."""
        if self._opened is not None and self._opened.pid != os.getpid():
            self._opened.close()
            self._opened = None
            fsspec.asyn.reset_lock()  # a thread of the parent may have held it
        if self._opened is None:
            folder = Path(self.cache).expanduser().absolute()
            self._opened = Files(folder, self.cache_bytes, self._remote, self._retries, self._witnesses)
        return self._opened

    def _witnesses(self, url: str) -> list[str]:
        """What is there if the store is up: the index beside a shard, or else other shards."""
        place = located(url)
        if self.index is None:
            return [place.beside(INDEX)]
        return [other for other in self._some.get(place.folder, ()) if other != url]


def _no_page(data: bytes) -> bytes:
    """Sick for the message of a proxy, which may be the same for an hour: no JSON begins like HTML."""
    if data.lstrip().startswith(b"<"):
        raise Sick(f"no index: {len(data)} bytes came that begin with {data[:40]!r}")
    return data
