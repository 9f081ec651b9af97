"""Batches from worker processes without copying: memory that both sides have mapped before the fork.

A new shared-memory segment for each batch, which is what a tensor in DataLoader's queue becomes, costs as much in page
faults as decoding its JPEGs. Anonymous mappings, unlike /dev/shm, have no limit that containers set to 64 MB.
"""

import mmap
import os
import weakref
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


def slot_bytes(kinds: Sequence[Sequence[Entry]]) -> int:
    """Of a slot for any of these kinds of batches."""
    return max(1, *(sum(entry.size for entry in entries) for entries in kinds))


class Ring:
    """`depth` slots for each of the workers.

    A worker takes a slot that nobody uses, and the reader gives it back once it has copied the batch; or lends the
    arrays to whoever takes the batch, and the slot is free when these are gone. A worker always finds one if depth is
    the number of batches that it may be ahead, plus one (in the reader's hands), plus `lendable`.
    """

    def __init__(self, workers: int, depth: int, kinds: Sequence[Sequence[Entry]], lendable: int = 0):
        """kinds: the arrays of each kind of batch that a slot may have to hold; lendable: slots of each worker that may
        be lent at the same time."""
        self.depth, self.lendable, self.reader = depth, lendable, os.getpid()
        slots = [mmap.mmap(-1, slot_bytes(kinds)) for _ in range(workers * depth)]
        self._slots = [[_arrays(slot, entries) for entries in kinds] for slot in slots]
        # Of each slot: whether a worker has taken it, then which of its arrays are lent. A byte for each, as a worker
        # reads what the reader writes.
        uses = len(slots), 1 + max(map(len, kinds))
        self._used = np.frombuffer(mmap.mmap(-1, prod(uses)), np.bool_).reshape(uses)

    def take(self, worker: int) -> int:
        """A slot, for the worker's next batch."""
        first = worker * self.depth
        slot = first + int(self._used[first : first + self.depth].any(1).argmin())
        if self._used[slot].any():
            raise RuntimeError("all slots are in use")
        self._used[slot, 0] = True
        return slot

    def arrays(self, slot: int, kind: int = 0) -> list[np.ndarray]:
        return self._slots[slot][kind]

    def give_back(self, slot: int) -> None:
        self._used[slot, 0] = False

    def lend(self, slot: int, kind: int = 0) -> list[np.ndarray] | None:
        """The arrays, which are written again once nothing refers to them any more; None if enough are lent already."""
        first = slot - slot % self.depth
        if self._used[first : first + self.depth, 1:].any(1).sum() >= self.lendable:
            return None
        lent = [array.view() for array in self.arrays(slot, kind)]
        for use, array in enumerate(lent, 1):
            self._used[slot, use] = True
            weakref.finalize(array, _return, self._used, self.reader, slot, use).atexit = False
        self.give_back(slot)
        return lent


def _return(used: np.ndarray, reader: int, slot: int, use: int) -> None:
    """Not a method: as long as something is lent, it would keep the memory of all slots."""
    if os.getpid() == reader:  # a process that was forked meanwhile drops only its copy of the array
        used[slot, use] = False
