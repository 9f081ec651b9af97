"""Which sample comes when: sample number t of the endless stream is a pure function of (count, seed, t)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diffusion_trainer.conventions import seed_of


def permutation(n: int, *key: int | str) -> np.ndarray:
    """(n,) int64, a permutation of range(n) that depends on the key alone (no library's random stream).

    The order of splitmix64 hashes (Steele, Lea and Flood 2014) of 1..n.
    """
    with np.errstate(over="ignore"):
        x = np.uint64(seed_of(*key)) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


@lru_cache(maxsize=2)  # a batch lies in one epoch, or in two at a border
def _epoch(count: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(count, seed, "order", epoch)


@dataclass(frozen=True)
class Order:
    """Every sample once per epoch, each epoch in an order of its own."""

    count: int
    seed: int

    def __call__(self, first: int, last: int) -> np.ndarray:
        """Samples number first..last-1 of the stream: (last - first,) indices into the set of `count` samples."""
        numbers = np.arange(first, last)
        epochs, places = np.divmod(numbers, self.count)
        parts = [_epoch(self.count, self.seed, int(e))[places[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(parts)
