"""Where a run's fp32 weights live on this rank: the view of EMA, checkpoints and evaluation on every strategy."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

CHUNK = 1 << 24  # elements: bounds the extra memory of the exchange


class Slot(NamedTuple):
    """Elements first..first+count-1 of a parameter (flattened) are elements at..at+count-1 of a master tensor."""

    name: str
    first: int
    count: int
    master: Tensor  # fp32, a key of the optimizer's state
    at: int


class Sharding(ABC):
    """This rank's fp32 master weights and their optimizer state, whatever the strategy."""

    replicated: bool  # every rank holds everything
    strategy: str = ""  # of the run, for the manifests of its checkpoints

    @property
    @abstractmethod
    def optimizer(self) -> Optimizer:
        """The torch optimizer that steps the masters."""

    @abstractmethod
    def slots(self) -> Iterator[Slot]:
        """Every element of a trained parameter that this rank holds, once."""

    @abstractmethod
    def publish(self) -> None:
        """Makes the forward pass see what the masters hold. All ranks must call it."""

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer steps on this rank, padding included."""

    @contextmanager
    def swapped(self, key: str) -> Iterator[bool]:
        """Inside, the model's weights are the optimizer's state `key` (its EMA); after, everything is as before.

        Master and average change places, so this needs no memory and leaves training bitwise as it was. Yields False
        and does nothing before the first step, when there is no such state. All ranks must enter and leave.
        """
        present = all(key in self.optimizer.state.get(m, {}) for m in self.masters())
        if present:
            self._exchange(key)
        try:
            yield present
        finally:
            if present:
                self._exchange(key)

    @torch.no_grad()
    def _exchange(self, key: str) -> None:
        for master in self.masters():
            ours, theirs = master.data.view(-1), self.optimizer.state[master][key].view(-1)
            for a, b in zip(ours.split(CHUNK), theirs.split(CHUNK), strict=True):
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)
        self.publish()


@dataclass(frozen=True)
class Replicated(Sharding):
    """One process, or DDP: the parameters are the masters."""

    model: nn.Module
    torch_optimizer: Optimizer
    replicated: bool = True
    strategy: str = ""

    @property
    def optimizer(self) -> Optimizer:
        return self.torch_optimizer

    def masters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def slots(self) -> Iterator[Slot]:
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                yield Slot(name, 0, p.numel(), p, 0)

    def publish(self) -> None:
        return None  # the forward pass reads the masters themselves
