"""Parts of remote shards as open files of one process."""

import os
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path

from diffusion_trainer.streaming.cache import Cache, touch
from diffusion_trainer.streaming.damage import MissingShard
from diffusion_trainer.streaming.fetching import Part, fetch
from diffusion_trainer.streaming.index import Shard
from diffusion_trainer.streaming.prefetching import Prefetcher
from diffusion_trainer.streaming.remote import Gone, Remote, check_there
from diffusion_trainer.streaming.retries import Retries
from diffusion_trainer.streaming.stores import MAX_OPEN

LOOK_SECONDS = 1.0  # files of evicted entries are closed so often, whose disk space is free only then
TOUCH_SECONDS = 60.0  # what is in use is marked so, so often
AHEAD_RETRIES = 2  # a part that the background cannot get soon is left to its reader, who waits for its lock
THREADS = 4

Piece = tuple[Shard, int, int]  # first byte, size
Key = tuple[str, int, bool]  # URL, first byte, whether it was fetched again


class Files:
    """What a process has open. For one thread; `prefetch` has its own, which touch the cache alone."""

    def __init__(
        self, folder: Path, limit: int, remote: Remote, retries: Retries, witnesses: Callable[[str], list[str]]
    ):
        self.pid = os.getpid()
        self.cache = Cache(folder, limit, release=self._close_evicted)
        self.remote, self.retries = remote, retries
        self.witnesses = witnesses  # what else should be where a shard is
        self._open: OrderedDict[Key, tuple[int, float]] = OrderedDict()  # descriptor, when it was marked
        self._evicted: dict[Key, float] = {}  # when
        self._gone: set[str] = set()
        self._look_again = 0.0
        weakref.finalize(self, _close, self._open).atexit = False

    def descriptor(self, shard: Shard, first: int, size: int, again: bool = False) -> int:
        """Of a file with the shard's bytes from `first` on; fewer than `size` if the shard ends before.

        MissingShard if the store has none; UserError if it does not answer.
        """
        key, now = (shard.url, first, again), time.monotonic()
        if now > self._look_again:
            self._close_evicted()
            self._look_again = now + LOOK_SECONDS
        descriptor, marked = self._open.get(key) or self._opened(key, shard, part_of((shard, first, size), again))
        if now - marked > TOUCH_SECONDS:
            touch(descriptor)
            self._open[key] = descriptor, now
        return descriptor

    def content(self, part: Part) -> bytes:
        """All of it; Gone if there is no such object."""
        descriptor = self.cache.open(part.name, part.size, partial(fetch, self.remote, self.retries, part))
        with open(descriptor, "rb") as file:
            return file.read()

    def close(self) -> None:
        _close(self._open)

    @cached_property
    def prefetch(self) -> Prefetcher:
        cache = Cache(self.cache.folder, self.cache.limit, wait=False)
        return Prefetcher(partial(_prefetch, cache, self.remote, self.retries), THREADS)

    def _opened(self, key: Key, shard: Shard, part: Part) -> tuple[int, float]:
        if shard.url in self._gone:
            raise MissingShard("the store has no such object")
        self._close_evicted()
        self._warn_if_evicted(key)
        try:
            descriptor = self.cache.open(part.name, part.size, partial(fetch, self.remote, self.retries, part))
        except Gone as gone:
            check_there(self.remote, self.retries, shard.url, self.witnesses(shard.url))
            self._gone.add(shard.url)
            raise MissingShard("the store has no such object") from gone
        self._open[key] = descriptor, time.monotonic()
        if len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[key]

    def _close_evicted(self) -> None:
        for key, (descriptor, _) in list(self._open.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(descriptor)
                del self._open[key]
                self._evicted[key] = time.monotonic()

    def _warn_if_evicted(self, key: Key) -> None:
        if time.monotonic() - self._evicted.pop(key, -TOUCH_SECONDS) < TOUCH_SECONDS:
            warnings.warn(
                f"the cache {self.cache.folder} is too small: shards are removed and fetched again within a minute. "
                f"Raise cache_bytes={self.cache.limit}, or fetch pieces (piece_bytes)",
                stacklevel=2,
            )


def _close(opened: dict[Key, tuple[int, float]]) -> None:
    while opened:
        os.close(opened.popitem()[1][0])


def _prefetch(cache: Cache, remote: Remote, retries: Retries, part: Part) -> None:
    fewer = Retries(min(AHEAD_RETRIES, retries.count), retries.backoff_seconds)
    descriptor = cache.open(part.name, part.size, partial(fetch, remote, fewer, part))
    if descriptor is not None:
        os.close(descriptor)


def pieces(shard: Shard, first: int, last: int, piece_bytes: int | None) -> Iterable[Piece]:
    """What is fetched for bytes [first, last) of a shard."""
    size = piece_bytes or max(1, shard.size)  # an index may say that there are none
    for start in range(first - first % size, last, size):
        yield shard, start, min(size, shard.size - start)


def part_of(piece: Piece, again: bool = False) -> Part:
    shard, first, size = piece
    return Part(shard, size, None if size == shard.size else first, again=again)
