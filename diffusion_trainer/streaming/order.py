"""Which sample comes when: sample number t of the endless stream is a pure function of (index, seed, t)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from math import ceil, gcd, lcm
from typing import NamedTuple

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


class Places(NamedTuple):
    """Where the samples of some numbers are, each (n,)."""

    source: np.ndarray
    shard: np.ndarray  # of the source
    sample: np.ndarray  # of the shard


def written(weight: float) -> Fraction:
    """The number that was written down: 0.6 is 3/5, not the nearest binary number."""
    return Fraction(str(weight))


def in_proportion(weights: Sequence[float], period: int) -> list[int]:
    """Whole numbers in the weights' very proportion; UserError if one has less than a sample of a period."""
    exact = [written(weight) for weight in weights]
    if min(exact) * period < sum(exact):
        raise UserError(
            f"a source with weight {min(weights)} of {float(sum(exact)):g} has less than a sample in {period}, a "
            f"mixing period; use a mixing_period of at least {ceil(sum(exact) / min(exact))}"
        )
    unit = lcm(*(weight.denominator for weight in exact))
    return [int(weight * unit) for weight in exact]


def turns(shares: Sequence[int], *key: int | str) -> tuple[np.ndarray, np.ndarray]:
    """Who has each of sum(shares) shuffled slots, and how many slots before it are theirs, both (sum(shares),)."""
    base = np.repeat(np.arange(len(shares)), shares)
    who = base[permutation(len(base), *key)]
    rank = np.empty(len(who), np.int64)
    for one, share in enumerate(shares):
        rank[who == one] = np.arange(share)
    return who, rank


def counts(n: int, parts: Sequence[int]) -> list[int]:
    """How many of the first n turns each one has, in proportion to the parts: exactly, where n is a multiple of their
    sum, and else to less than as many turns as there are parts. None has fewer as n grows.

    The first has its part of the turns, rounded down; the others share what is left in the same way.
    """
    found, left, total = [], n, sum(parts)
    for part in parts:
        found.append(left * part // total if part else 0)
        left, total = left - found[-1], total - part
    return found


def turns_of(block: int, period: int, parts: Sequence[int], *key: int | str) -> tuple[np.ndarray, np.ndarray]:
    """As `turns`, of the slots [block * period, (block + 1) * period): who has each, and how many before it since
    slot 0 are theirs."""
    before, after = (np.array(counts(n * period, parts)) for n in (block, block + 1))
    who, rank = turns(after - before, *key, block)
    return who, before[who] + rank


@dataclass(frozen=True, eq=False)
class Mix:
    """The stream of several sources: each has its part of each `period` samples in a lane, shuffled.

    Where each one's part of a period is whole it has exactly that. Else the numbers differ from period to period, so
    that after any number of them each has its part of all samples to less than there are sources.
    """

    orders: Sequence[Order]
    shares: Sequence[int]  # of any size
    period: int | None = None  # None: their sum

    def __post_init__(self):
        object.__setattr__(self, "period", self.period or sum(self.shares))
        object.__setattr__(self, "_pattern", lru_cache(2 * self.orders[0].lanes + 2)(self._pattern))

    def bucket(self, numbers: range) -> int:
        """Which of the data's shapes a piece has: there is one."""
        return 0

    def __call__(self, numbers: range) -> Places:
        """Of samples `numbers` of the stream."""
        lanes, n = self.orders[0].lanes, np.arange(numbers.start, numbers.stop, numbers.step)
        places = Places(*(np.empty(len(n), np.int64) for _ in Places._fields))
        cycle = lanes // gcd(lanes, numbers.step)  # after so many numbers the lanes come again
        for first in range(min(cycle, len(n))):
            mine, lane = slice(first, None, cycle), int(n[first]) % lanes
            for out, found in zip(places, self._places(lane, *self._numbers(lane, n[mine])), strict=True):
                out[mine] = found
        return places

    def instead(self, number: int, attempt: int) -> tuple[int, int, int]:
        """Source, shard and sample of another one of its source for a damaged one, see `Order.another`."""
        lanes = self.orders[0].lanes
        source, element = self._numbers(number % lanes, np.array([number]))
        other = self.orders[int(source[0])].another(int(element[0]), attempt)
        return tuple(int(place[0]) for place in self._places(other % lanes, source, np.array([other])))

    def _places(self, lane: int, source: np.ndarray, numbers: np.ndarray) -> Places:
        if len(self.orders) == 1:
            return Places(source, *self.orders[0](lane, numbers))
        places = Places(source, np.empty(len(source), np.int64), np.empty(len(source), np.int64))
        for s in np.unique(source):
            here = source == s
            places.shard[here], places.sample[here] = self.orders[s](lane, numbers[here])
        return places

    def _numbers(self, lane: int, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of samples n, all of one lane: the source, and the number in its order."""
        if len(self.orders) == 1:
            return np.zeros(len(n), np.int64), n
        lanes = self.orders[0].lanes
        blocks, slots = np.divmod(n // lanes, self.period)
        source, elements = np.empty(len(n), np.int64), np.empty(len(n), np.int64)
        for block in np.unique(blocks):
            here = blocks == block
            which, rank = self._pattern(lane, int(block))
            source[here] = which[slots[here]]
            elements[here] = rank[slots[here]]
        return source, elements * lanes + lane

    def _pattern(self, lane: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        return turns_of(block, self.period, self.shares, self.orders[0].seed, "mix", lane)
