"""Aspect-ratio buckets: each global batch has one shape, the same on all ranks, near that of its images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import lcm

import numpy as np

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.mixing import Mix, Places, turns_of, written
from diffusion_trainer.streaming.order import Order


def nearest(sizes: np.ndarray, shapes: Sequence[Sequence[int]]) -> np.ndarray:
    """Of (n, 2) heights and widths, the numbers (n,) of the shapes whose aspect ratio is nearest (in its logarithm).

    Images of unknown size (0) go with shape 0: they are damaged, which is found when they are read.
    """
    aspect = np.log(np.maximum(sizes[:, 0], 1) / np.maximum(sizes[:, 1], 1))
    wanted = np.log([height / width for height, width in shapes])
    return np.where(sizes.all(1), np.abs(aspect[:, None] - wanted).argmin(1), 0)


@dataclass(frozen=True)
class Bucket:
    """The samples of one shape."""

    mix: Mix
    sources: Sequence[int]  # those that have any
    picks: Sequence[Sequence[np.ndarray]]  # of each of them and each of its shards, which samples

    def samples(self, places: Places) -> Places:
        """From samples of the bucket to samples of the shards."""
        rows = list(zip(*(p.tolist() for p in places), strict=True))
        source = np.array([self.sources[s] for s, _, _ in rows])
        return Places(source, places.shard, np.array([self.picks[s][k][i] for s, k, i in rows], np.int64))


@dataclass(frozen=True, eq=False)
class Bucketed:
    """A stream in which each global batch is of one bucket: of each period of steps each has its part, shuffled.

    Within a bucket the order is that of `Mix`: each sample once per epoch of the bucket. It depends on the batch size.
    """

    buckets: Sequence[Bucket]
    shares: Sequence[int]  # of the steps; of any size
    period: int  # of steps
    batch_size: int
    seed: int

    def __post_init__(self):
        object.__setattr__(self, "_steps", lru_cache(4)(self._steps))

    def bucket(self, numbers: range) -> int:
        return self._turn(numbers.start)[0]

    def __call__(self, numbers: range) -> Places:
        """Of samples of one global batch."""
        bucket, first = self._turn(numbers.start)
        away = first - numbers.start // self.batch_size * self.batch_size
        inside = range(numbers.start + away, numbers.stop + away, numbers.step)
        return self.buckets[bucket].samples(self.buckets[bucket].mix(inside))

    def instead(self, number: int, attempt: int) -> tuple[int, int, int]:
        """See `Mix`; of the same bucket."""
        bucket, first = self._turn(number)
        place = self.buckets[bucket].mix.instead(first + number % self.batch_size, attempt)
        return tuple(int(p[0]) for p in self.buckets[bucket].samples(Places(*(np.array([p]) for p in place))))

    def _turn(self, number: int) -> tuple[int, int]:
        """Of the batch of sample `number`: its bucket, and the number that its first sample has there."""
        block, slot = divmod(number // self.batch_size, self.period)
        who, rank = self._steps(block)
        return int(who[slot]), int(rank[slot]) * self.batch_size

    def _steps(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        return turns_of(block, self.period, self.shares, self.seed, "buckets")


def bucketed(
    assigned: Mapping[str, Sequence[np.ndarray]],  # source -> of each shard, the bucket of each sample
    weights: Sequence[float],  # of the sources
    shapes: Sequence[Sequence[int]],
    batch_size: int,
    period: int,  # of the steps, and of mixing within a bucket
    seed: int,
    lanes: int,
    window: int,
) -> Bucketed:
    """In the long run each source has exactly its weight's part of all samples, and its samples come equally often.

    UserError for a source without samples, or a shape that has too few to come in each period of steps.
    """
    for name, shards in assigned.items():
        if not any(map(len, shards)):
            raise UserError(f"source {name} has no samples")
    picks = [  # of each bucket, source and shard
        [[np.flatnonzero(shard == b).astype(np.uint32) for shard in shards] for shards in assigned.values()]
        for b in range(len(shapes))
    ]
    counts = [[[len(shard) for shard in shards] for shards in sources] for sources in picks]
    parts = _parts([[sum(shards) for shards in sources] for sources in counts], weights)
    _check(parts, counts, shapes, period)
    made = []
    for shape, mine, picked, counted in zip(shapes, parts, picks, counts, strict=True):
        here = [s for s, part in enumerate(mine) if part]
        names = list(assigned)
        orders = [Order(np.array(counted[s]), seed, f"{names[s]} {shape}", lanes, window) for s in here]
        mix = Mix(orders, [mine[s] for s in here], period)
        made.append(Bucket(mix, here, [picked[s] for s in here]))
    return Bucketed(made, [sum(mine) for mine in parts], period, batch_size, seed)


def _parts(counts: Sequence[Sequence[int]], weights: Sequence[float]) -> list[list[int]]:
    """Of each bucket, and of each source in it, its part of all samples: what its samples there are of the source,
    times the source's weight. Exactly, as whole numbers in proportion."""
    totals = [sum(source) for source in zip(*counts, strict=True)]
    exact = [[written(w) * c / n for w, c, n in zip(weights, bucket, totals, strict=True)] for bucket in counts]
    unit = lcm(*(part.denominator for bucket in exact for part in bucket))
    return [[int(part * unit) for part in bucket] for bucket in exact]


def _check(
    parts: Sequence[Sequence[int]],
    counts: Sequence[Sequence[Sequence[int]]],
    shapes: Sequence[Sequence[int]],
    period: int,
) -> None:
    whole = sum(map(sum, parts))
    for mine, sources, shape in zip(parts, counts, shapes, strict=True):
        if sum(mine) * period < whole:
            raise UserError(
                f"data.buckets: only {sum(map(sum, sources))} images are nearest to {'x'.join(map(str, shape))}, too "
                f"few for one step in {period}; leave it out, and they go to the next nearest"
            )
