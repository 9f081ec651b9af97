"""How pieces of global batches come from workers to a rank."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.damage import Found, Hopeless
from diffusion_trainer.streaming.fields import Decoder
from diffusion_trainer.streaming.ring import Entry, Ring, slot_bytes
from diffusion_trainer.streaming.workers import DeadWorker, pieces

LENDABLE = 2  # batches of a worker: one in the step, one that has been fetched for the next; others are copied


@dataclass(frozen=True)
class Layout:
    """How a global batch is cut into pieces, one for each of `world` ranks and its `micro_batches`.

    Piece c of P has the places c, c + P, c + 2 P, ... of the batch: whole lanes, if P divides the lanes.
    """

    batch_size: int  # images of the global batch
    world: int = 1
    rank: int = 0
    micro_batches: int = 1

    def __post_init__(self):
        if self.batch_size % self.pieces:
            raise UserError(
                f"batch_size={self.batch_size} does not divide over {self.world} processes x {self.micro_batches} "
                f"micro-batches (trainer.accumulate_grad_batches); use a multiple of {self.pieces}"
            )

    @property
    def pieces(self) -> int:
        return self.world * self.micro_batches

    @property
    def size(self) -> int:
        """Samples of a piece."""
        return self.batch_size // self.pieces

    def numbers(self, item: int) -> range:
        """Sample numbers of this rank's item: piece `item` % micro_batches of its share of global batch
        `item` // micro_batches, which is samples [step * batch_size, (step + 1) * batch_size)."""
        step, micro_batch = divmod(item, self.micro_batches)
        first = step * self.batch_size
        return range(first + self.rank * self.micro_batches + micro_batch, first + self.batch_size, self.pieces)


class Filled(NamedTuple):
    """What came with a piece's arrays."""

    objects: Mapping[str, list]  # fields that are no arrays
    samples: np.ndarray  # (n, 2) int64, shard (of all sources) and sample that were used
    found: Sequence[Found]


class Piece(NamedTuple):
    """One item, as a worker hands it over: its arrays lie in a slot of the ring."""

    slot: int
    bucket: int
    filled: Filled


class Stop(NamedTuple):
    """Instead of a piece, as data: an exception would lose its message on the way from a worker."""

    message: str
    passing: bool  # whether it is a PassingError
    found: Sequence[Found] = ()

    @classmethod
    def of(cls, error: UserError) -> "Stop":
        found = error.found if isinstance(error, Hopeless) else []
        return cls(str(error), isinstance(error, PassingError), found)

    def batch(self) -> dict[str, Any]:
        return {"error": self.message, "passing": self.passing, "damage": list(self.found)}


@dataclass
class Loader:
    """This rank's items, in order: batches on the CPU, in pinned memory where there is a GPU.

    Each is {field: tensor or list, first: number of its first sample, samples: (B, 2) int64, the shards and samples in
    them that were used, damage: a list of Found}. What stops the run comes as {error: its message, passing: whether it
    is a PassingError, damage: a list of Found} instead, and is the last.

    Without a GPU the arrays of a batch are memory shared with the workers, written again once this process drops them:
    what a forked process is to keep, clone before the fork.
    """

    source: Callable[[Ring], Dataset]  # of pieces, or a Stop
    decoder: Decoder
    layout: Layout
    items: range
    workers: int
    prefetch: int  # items that each worker may be ahead
    shapes: Sequence[Sequence[int] | None] = (None,)  # height and width of each aspect bucket
    indexed: bool = True  # the source is asked for items; else it is an iterable, and each worker has every W-th

    def __len__(self) -> int:
        return len(self.items)

    @property
    def kinds(self) -> list[list[Entry]]:
        """What a slot of the ring may have to hold."""
        return [self.decoder.entries(self.layout.size, shape) for shape in self.shapes]

    @property
    def lendable(self) -> int:
        return 0 if torch.cuda.is_available() else LENDABLE  # a GPU wants pinned memory, which is a copy

    @property
    def slots(self) -> tuple[int, int]:
        """Of the ring: workers, and slots of each."""
        return max(1, self.workers), (self.prefetch if self.workers else 0) + 1 + self.lendable

    @property
    def ring_bytes(self) -> int:
        return prod(self.slots) * slot_bytes(self.kinds)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        ring = Ring(*self.slots, self.kinds, self.lendable)
        loader = DataLoader(
            self.source(ring),
            batch_size=None,
            sampler=self.items if self.indexed else None,
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_outlive_a_stop,
            multiprocessing_context="fork" if self.workers else None,  # the ring is mapped in both
        )
        try:
            for item, piece in zip(self.items, pieces(loader), strict=False):
                if isinstance(piece, Stop):  # the last, whatever other workers have made
                    yield piece.batch()
                    return
                yield self._batch(item, piece, ring)
        except DeadWorker as death:
            yield Stop.of(death).batch()

    def _batch(self, item: int, piece: Piece, ring: Ring) -> dict[str, Any]:
        """The piece, lent from the ring or copied out of it."""
        objects, samples, found = piece.filled
        arrays = ring.lend(piece.slot, piece.bucket)
        if arrays is None:
            tensors = [_copy(array) for array in ring.arrays(piece.slot, piece.bucket)]
            ring.give_back(piece.slot)
        else:
            tensors = [torch.from_numpy(array) for array in arrays]
        batch = self.decoder.batch(tensors, objects)
        first = self.layout.numbers(item).start
        return batch | {"first": first, "samples": torch.from_numpy(samples), "damage": found}


def _copy(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return torch.empty_like(tensor, pin_memory=torch.cuda.is_available()).copy_(tensor)


def _as_it_is(piece: Piece | Stop) -> Piece | Stop:
    return piece  # DataLoader's own would make tensors of the small arrays, each with a file of its own


def _outlive_a_stop(worker: int) -> None:
    # srun and terminals signal every process of a run, but the rank needs its workers until it has saved. A second
    # SIGTERM (multiprocessing's, at exit) ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
