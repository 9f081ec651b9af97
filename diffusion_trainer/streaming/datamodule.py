"""From shards to batches: the item of the data set is a step, so position, world size and workers are arithmetic."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming import decoding
from diffusion_trainer.streaming.order import Order
from diffusion_trainer.streaming.shards import Shards, find


@dataclass(frozen=True)
class Layout:
    """How a global batch is cut: each of `world` ranks takes its part in `micro_batches` pieces."""

    batch_size: int  # images of the global batch
    world: int = 1
    rank: int = 0
    micro_batches: int = 1

    def __post_init__(self):
        if self.batch_size % (self.world * self.micro_batches):
            raise UserError(
                f"batch_size={self.batch_size} does not divide over {self.world} processes x {self.micro_batches} "
                f"micro-batches (trainer.accumulate_grad_batches); "
                f"use a multiple of {self.world * self.micro_batches}"
            )

    def numbers(self, step: int, micro_batch: int) -> range:
        """Sample numbers of this rank's piece of global batch `step`, [step * batch_size, (step + 1) * batch_size)."""
        size = self.batch_size // (self.world * self.micro_batches)
        first = step * self.batch_size + (self.rank * self.micro_batches + micro_batch) * size
        return range(first, first + size)


@dataclass(frozen=True)
class ShardData:
    """Images, and labels if any, of WebDataset shards on local disks.

    shards: path, glob or brace pattern, or a list of them. label: the extension of the class, null for none.
    Batches: image (B, channels, height, width) uint8; label (B,) int64; first, an int: they are samples number
    first..first+B-1 of the endless stream. What cannot be read or decoded comes as {error: its message} instead.
    """

    shards: str | Sequence[str]
    channels: int
    height: int
    width: int
    label: str | None = "cls"
    num_workers: int = 0

    def __post_init__(self):
        if self.channels not in decoding.MODES:
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {self.channels}")
        if self.label is not None and self.label not in decoding.LABELS:
            raise ValueError(f"label must be one of {sorted(decoding.LABELS)} or null, not {self.label}")
        if min(self.height, self.width) < 1 or self.num_workers < 0:
            raise ValueError("height and width must be positive, num_workers not negative")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @cached_property
    def samples(self) -> Shards:
        labels = {"label": (self.label,)} if self.label else {}
        return Shards(find(self.shards), {"image": decoding.IMAGES} | labels)

    @property
    def fields(self) -> tuple[str, ...]:
        """Of a batch."""
        return ("image", "label") if self.label else ("image",)

    def labels(self) -> Tensor:
        """(N,) int64, of every sample, without reading their images."""
        found = [self._label(i, self.samples.read_field(i, "label")) for i in range(len(self.samples))]
        return torch.from_numpy(np.stack(found))

    def decode(self, i: int) -> dict[str, np.ndarray]:
        """Sample i of the set; UserError names the shard if it cannot be decoded or has another size."""
        data = self.samples.read(i)
        try:
            fields = {"image": decoding.image(data["image"], self.channels)}
        except (OSError, ValueError) as error:
            raise UserError(f"{self.samples.where(i)}: cannot be decoded ({error}); write the shard again") from error
        if self.label:
            fields["label"] = self._label(i, data["label"])
        if fields["image"].shape != self.image_shape:
            raise UserError(
                f"{self.samples.where(i)}: image of {fields['image'].shape[1:]} pixels, the configuration says "
                f"data.height={self.height} data.width={self.width}"
            )
        return fields

    def _label(self, i: int, data: bytes) -> np.ndarray:
        try:
            return decoding.LABELS[self.label](data)
        except ValueError as error:
            raise UserError(
                f"{self.samples.where(i)}: label cannot be decoded ({error}); write the shard again"
            ) from error

    def loader(self, layout: Layout, seed: int, first_step: int, last_step: int) -> DataLoader:
        """This rank's pieces of global batches first_step..last_step-1, in order."""
        items = range(first_step * layout.micro_batches, last_step * layout.micro_batches)
        return DataLoader(
            Batches(self, layout, Order(len(self.samples), seed)),
            batch_size=None,
            sampler=items,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_outlive_a_stop,
        )

    def once(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        """Every sample once, in the order of the shards, dealt over the ranks; the last batch may be short."""
        mine = range(rank, len(self.samples), world)
        for first in range(0, len(mine), batch_size):
            yield collate([self.decode(i) for i in mine[first : first + batch_size]])


@dataclass(frozen=True)
class Batches(Dataset):
    """Item k is piece k % micro_batches of global batch k // micro_batches."""

    data: ShardData
    layout: Layout
    order: Order

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        numbers = self.layout.numbers(*divmod(k, self.layout.micro_batches))
        samples = self.order(numbers.start, numbers.stop)
        try:
            return collate([self.data.decode(int(i)) for i in samples]) | {"first": numbers.start}
        except UserError as error:
            return {"error": str(error)}  # as data: an exception would lose its message on the way from a worker


def _outlive_a_stop(worker: int) -> None:
    # srun and terminals signal every process of a run, but the rank needs its workers until it has saved. A second
    # SIGTERM (multiprocessing's, at exit) ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def collate(samples: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}
