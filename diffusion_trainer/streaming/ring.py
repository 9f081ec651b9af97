"""Batches from worker processes without copying: memory that both sides have mapped before the fork.

A new shared-memory segment for each batch, which is what a tensor in DataLoader's queue becomes, costs as much in page
faults as decoding its JPEGs. Anonymous mappings, unlike /dev/shm, have no limit that containers set to 64 MB.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

ALIGNMENT = 64  # bytes, of each array


@dataclass(frozen=True)
class Entry:
    """One array of a batch."""

    shape: tuple[int, ...]  # (B, *stored)
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes, rounded up to the alignment."""
        return -(-prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _arrays(memory: mmap.mmap, entries: Sequence[Entry]) -> list[np.ndarray]:
    """The entries as they lie in the memory, one after the other."""
    found, at = [], 0
    for entry in entries:
        found.append(np.frombuffer(memory, entry.dtype, prod(entry.shape), at).reshape(entry.shape))
        at += entry.size
    return found


class Ring:
    """`depth` slots for each of the workers, used in turn.

    A slot is written again `depth` batches of its worker later, and must have been copied by then: depth must exceed
    the number of batches that a worker may be ahead by two (one is being written, one is in the reader's hands).
    """

    def __init__(self, workers: int, depth: int, kinds: Sequence[Sequence[Entry]]):
        """kinds: the arrays of each kind of batch that a slot may have to hold."""
        self.depth = depth
        size = max(1, *(sum(entry.size for entry in entries) for entries in kinds))
        slots = [mmap.mmap(-1, size) for _ in range(workers * depth)]
        self._slots = [[_arrays(slot, entries) for entries in kinds] for slot in slots]

    def slot(self, worker: int, count: int) -> int:
        """Of the worker's batch number `count`."""
        return worker * self.depth + count % self.depth

    def arrays(self, slot: int, kind: int = 0) -> list[np.ndarray]:
        return self._slots[slot][kind]
