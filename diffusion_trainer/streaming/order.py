"""Which sample of a source comes when: number t of its endless stream is a pure function of (index, seed, t)."""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from diffusion_trainer.conventions import UserError, seed_of

NEAR, NEARBY = 4, 12  # attempts to replace a damaged sample by one of its window, and of its lane


def permutation(n: int, *key: int | str) -> np.ndarray:
    """(n,) int64, a permutation of range(n) that depends on the key alone (no library's random stream).

    The order of splitmix64 hashes (Steele, Lea and Flood 2014) of 1..n.
    """
    with np.errstate(over="ignore"):
        x = np.uint64(seed_of(*key)) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


@dataclass(frozen=True, eq=False)
class Order:
    """The endless shuffled sequence of one source's samples: every one once in each epoch of N numbers.

    Number n belongs to lane n % lanes. In each epoch the shards, in a random order that stays, are cut into a run of
    samples for each lane (the cuts may fall within shards, and move by less than `lanes` samples from epoch to epoch).
    A lane shuffles the shards of its run, then the samples within windows. So a lane reads few shards at a time, and
    the same ones for ever, which keeps the caches of nodes warm.
    """

    counts: np.ndarray  # (shards,) samples of each
    seed: int
    source: str
    lanes: int
    window: int  # samples of a lane that are shuffled among each other
    total: int = field(init=False)  # N

    def __post_init__(self):
        if self.lanes < 1 or self.window < 1:
            raise ValueError(f"lanes and window must be positive, not {self.lanes} and {self.window}")
        object.__setattr__(self, "total", int(np.sum(self.counts)))
        if self.total < 1:
            raise UserError(f"source {self.source} has no samples")
        # A process needs one window of each of its lanes, and the next ones at the borders.
        for name in ("_run", "_window"):
            object.__setattr__(self, name, lru_cache(2 * self.lanes + 2)(getattr(self, name)))

    def __call__(self, lane: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of ascending numbers of one lane, the shards and the samples in them, both (n,)."""
        shards, samples = np.empty(len(numbers), np.int64), np.empty(len(numbers), np.int64)
        at = 0
        while at < len(numbers):
            epoch = int(numbers[at]) // self.total
            first = self._first(lane, epoch)
            window = (int(numbers[at]) - first) // self.lanes // self.window
            begin = first + window * self.window * self.lanes
            stop = at + int(
                np.searchsorted(numbers[at:], min(begin + self.window * self.lanes, (epoch + 1) * self.total))
            )
            places = (numbers[at:stop] - begin) // self.lanes
            for out, table in zip((shards, samples), self._window(lane, epoch, window), strict=True):
                out[at:stop] = table[places]
            at = stop
        return shards, samples

    def another(self, number: int, attempt: int) -> int:
        """A number whose sample replaces a damaged one: a function of the number and of how many were damaged before.

        First ones of its window, whose shards are being read anyway, then of its lane, then any: a whole shard may be
        gone, or all that a lane has.
        """
        lane, epoch = number % self.lanes, number // self.total
        drawn = seed_of(self.seed, self.source, "another", number, attempt)
        if attempt >= NEAR + NEARBY:
            return epoch * self.total + drawn % self.total
        first, length = self._first(lane, epoch), self._cut(lane + 1, epoch) - self._cut(lane, epoch)
        place = (number - first) // self.lanes
        low, count = place // self.window * self.window, self.window
        if attempt >= NEAR or min(count, length - low) < 2:
            low, count = 0, length
        count = min(count, length - low)
        if count < 2:
            return number + self.lanes * (1 + attempt % 2)  # the lane's next ones
        return first + self.lanes * (low + (place - low + 1 + drawn % (count - 1)) % count)

    def _first(self, lane: int, epoch: int) -> int:
        """The lane's first number of the epoch."""
        return epoch * self.total + (lane - epoch * self.total) % self.lanes

    @cached_property
    def _line(self) -> tuple[np.ndarray, np.ndarray]:
        """All shards in their lasting order, and where each ends."""
        shards = permutation(len(self.counts), self.seed, self.source, "shards")
        return shards, np.cumsum(self.counts[shards])

    def _cut(self, lane: int, epoch: int) -> int:
        """How many numbers of the epoch belong to lanes before this one: where its run begins in the line."""

        def below(n: int) -> int:
            return n // self.lanes * lane + min(n % self.lanes, lane)

        return below((epoch + 1) * self.total) - below(epoch * self.total)

    def _run(self, lane: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of shards of a lane's epoch in their shuffled order: shard, first sample less place, end."""
        shards, ends = self._line
        first, last = self._cut(lane, epoch), self._cut(lane + 1, epoch)
        pieces = slice(np.searchsorted(ends, first, "right"), np.searchsorted(ends, last, "left") + 1)
        shards, ends = shards[pieces], ends[pieces]
        starts = ends - self.counts[shards]
        begins = np.maximum(starts, first)
        p = permutation(len(shards), self.seed, self.source, "run", lane, epoch)
        sizes = (np.minimum(ends, last) - begins)[p]
        place = np.cumsum(sizes) - sizes
        return shards[p], (begins - starts)[p] - place, place + sizes

    def _window(self, lane: int, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and sample at each place of a window."""
        shards, shifts, ends = self._run(lane, epoch)
        first = window * self.window
        n = min(self.window, int(ends[-1]) - first)
        places = first + permutation(n, self.seed, self.source, "window", lane, epoch, window)
        pieces = np.searchsorted(ends, places, "right")
        return shards[pieces].astype(np.int32), (shifts[pieces] + places).astype(np.int32)
