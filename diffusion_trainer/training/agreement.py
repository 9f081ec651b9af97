"""What ranks must decide together, on the CPU, so that no device is waited for."""

from datetime import timedelta
from typing import Any

import torch
from torch import distributed


class Agreement:
    """A gloo group of all ranks beside the one that trains; with one process every method is free."""

    def __init__(self, timeout_seconds: int = 600, alone: bool = False):
        """All ranks must make it at the same time. alone: this process with itself, though there may be others."""
        self.world = 1 if alone or not distributed.is_initialized() else distributed.get_world_size()
        self.rank = distributed.get_rank() if self.world > 1 else 0
        self._group = None
        if self.world > 1:
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes. All ranks must ask."""
        if self._group is None:
            return flag
        vote = torch.tensor(flag, dtype=torch.int32)
        distributed.all_reduce(vote, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(vote)

    def mean(self, values: list[float]) -> list[float]:
        """The mean of each value over the ranks, in float64."""
        if self._group is None:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sums, group=self._group)
        return (sums / self.world).tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value, group=self._group)
        return values
