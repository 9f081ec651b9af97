"""The seam of conditionings."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Conditioning(nn.Module, ABC):
    """Turns fields of a batch into a vector for the network. A condition is a tensor of (B, ...) or None."""

    dim: int  # of the vector; 0 where there is none
    fields: tuple[str, ...]  # names of the batch's fields that it reads

    @abstractmethod
    def check(self, batch: Mapping[str, Tensor]) -> None:
        """UserError for a condition that cannot be. For a batch still on the CPU, so that no device is waited for."""

    @abstractmethod
    def examples(self, count: int) -> Tensor | None:
        """(count, ...) conditions to look at, different ones in turn, on the CPU; UserError if it knows none."""

    @abstractmethod
    def stand_in(self, count: int) -> Tensor | None:
        """(count, ...) conditions of which only shape and dtype count, for checks; on torch's default device."""

    @abstractmethod
    def read(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The condition of each sample."""

    @abstractmethod
    def drop(self, condition: Tensor | None, dropped: Tensor) -> Tensor | None:
        """Nulls the condition where `dropped`, (B,) bool (condition dropout, Ho and Salimans 2022, algorithm 1)."""

    @abstractmethod
    def null(self, condition: Tensor | None) -> Tensor | None:
        """The null condition, in the shape of `condition`."""

    @abstractmethod
    def forward(self, condition: Tensor | None) -> Tensor | None:
        """(B, dim), or None where dim is 0."""
