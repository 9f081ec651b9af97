"""Aspect-ratio buckets: each global batch has one shape, the same on all ranks, near that of its images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.order import Mix, Order, Places, shares, turns


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
    """A stream in which each global batch is of one bucket, in proportion to their samples over each period of steps.

    Within a bucket the order is that of `Mix`: each sample once per epoch of the bucket. It depends on the batch size.
    """

    buckets: Sequence[Bucket]
    shares: Sequence[int]  # steps of each bucket in a period
    batch_size: int
    seed: int

    def __post_init__(self):
        object.__setattr__(self, "_period", lru_cache(4)(self._period))

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
        period, slot = divmod(number // self.batch_size, sum(self.shares))
        who, rank = self._period(period)
        bucket = int(who[slot])
        return bucket, (period * self.shares[bucket] + int(rank[slot])) * self.batch_size

    def _period(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        return turns(self.shares, self.seed, "buckets", period)


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
    """UserError for a shape that has too few samples to come at all."""
    made, portions = [], []
    totals = [sum(len(shard) for shard in shards) for shards in assigned.values()]
    for b in range(len(shapes)):
        picks = [[np.flatnonzero(shard == b).astype(np.uint32) for shard in shards] for shards in assigned.values()]
        counts = [[len(shard) for shard in shards] for shards in picks]
        portions.append(sum(w * sum(c) / n for w, c, n in zip(weights, counts, totals, strict=True)) / sum(weights))
        if portions[b] * period < 1:
            shape = "x".join(map(str, shapes[b]))
            raise UserError(
                f"data.buckets: only {sum(map(sum, counts))} images are nearest to {shape}, too few for one step in "
                f"{period}; leave it out, and they go to the next nearest"
            )
        here = [s for s, c in enumerate(counts) if sum(c)]
        names = list(assigned)
        orders = [Order(np.array(counts[s]), seed, f"{names[s]} {shapes[b]}", lanes, window) for s in here]
        mix = Mix(orders, shares([weights[s] for s in here], period))
        made.append(Bucket(mix, here, [picks[s] for s in here]))
    return Bucketed(made, shares(portions, period), batch_size, seed)
