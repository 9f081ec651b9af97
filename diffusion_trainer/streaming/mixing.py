"""Which source's turn it is: each has its weight's part of every period, and sample number t stays a function of t."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise
from math import ceil, gcd, isqrt, lcm
from typing import NamedTuple

import numpy as np

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.order import Order, permutation


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


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of (a i + b) // m over i < n, for a, b >= 0, in O(log m): the points below a line, as Euclid's algorithm
    counts them."""
    total = 0
    while True:
        total += a // m * (n * (n - 1) // 2) + b // m * n
        a, b = a % m, b % m
        if a * n + b < m:
            return total
        n, b = divmod(a * n + b, m)
        m, a = a, m


@lru_cache
def _stride(size: int) -> int:
    """Its multiples meet all of range(size), and are spread evenly wherever one stops: by the golden section."""
    stride = (isqrt(5 * size * size) - size) // 2
    while gcd(stride, size) > 1:
        stride += 1
    return stride


def counts(n: int, period: int, parts: Sequence[int], start: Fraction = Fraction(0)) -> list[int]:
    """How many turns each one has in the first n periods: in each its part of the period, rounded down or up. What is
    rounded evens out: it grows with log n, to less than 7 turns in a million periods, and is nothing in the end.

    Systematic sampling (Madow 1949). What is left of the parts without their whole turns lies in a row, and points at
    distance 1 say who has one turn more. In each period they begin elsewhere: the first time at start, in [0, 1).
    """
    size, whole, ends = _row(period, parts)
    if not ends[-1]:
        return [n * turns for turns in whole]
    stride, first = _stride(size), int(start * size)
    all_points = floor_sum(n, size, stride, first)

    def points(end: int) -> int:
        """How many there are below end."""
        q, rest = divmod(end, size)
        return n * q + (n + all_points - floor_sum(n, size, stride, first + size - rest) if rest else 0)

    return _with_their_points(n, whole, map(points, ends))


def _row(period: int, parts: Sequence[int]) -> tuple[int, list[int], list[int]]:
    """The distance of points, each one's whole turns of a period, and where the row begins and what is left of each of
    them ends."""
    size = sum(parts) << 80  # far more positions than there will be periods
    shares = [divmod(period * part << 80, size) for part in parts]
    return size, [turns for turns, _ in shares], list(accumulate((left for _, left in shares), initial=0))


def _with_their_points(n: int, whole: Sequence[int], points: Iterable[int]) -> list[int]:
    more = [after - before for before, after in pairwise(points)]
    return [n * turns + one_more for turns, one_more in zip(whole, more, strict=True)]


def turns_of(
    block: int, period: int, parts: Sequence[int], *key: int | str, start: Fraction = Fraction(0)
) -> tuple[np.ndarray, np.ndarray]:
    """As `turns`, of the slots [block * period, (block + 1) * period): who has each, and how many before it since
    slot 0 are theirs. start: see `counts`."""
    size, whole, ends = _row(period, parts)
    first = (int(start * size) + block * _stride(size)) % size if ends[-1] else 0
    here = _with_their_points(1, whole, ((end - first - 1) // size for end in ends))
    who, rank = turns(here, *key, block)
    return who, np.array(counts(block, period, parts, start))[who] + rank


@dataclass(frozen=True, eq=False)
class Mix:
    """The stream of several sources: each has its part of each `period` samples in a lane, shuffled.

    Where that is no whole number it is rounded, up in some lanes and down in others: in all lanes together a period is
    off by one sample at most, and all of them by nothing in the long run.
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
        start = Fraction(lane, self.orders[0].lanes)
        return turns_of(block, self.period, self.shares, self.orders[0].seed, "mix", lane, start=start)
