"""Noise levels: the numbers of a schedule at one time."""

from collections.abc import Sequence
from math import inf, log
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusion_trainer.process.schedules import Schedule


class Level(NamedTuple):
    """x_t = alpha x_0 + sigma eps at time t. Floats while sampling, so that no step waits for the device; (B,) tensors
    while training. What only adds, multiplies, divides and takes powers serves both.
    """

    t: float | Tensor
    alpha: float | Tensor
    sigma: float | Tensor

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma) of floats; -inf without signal, inf without noise."""
        if not self.alpha:
            return -inf
        return log(self.alpha / self.sigma) if self.sigma else inf

    @property
    def log_snr(self) -> float:
        return 2 * self.half_log_snr


def levels(schedule: "Schedule", times: Tensor | Sequence[float]) -> list[Level]:
    """The levels at times (N,), as floats, computed in float64 on the CPU: once for a sampling run."""
    t = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    numbers = (values.tolist() for values in schedule.level(t))
    return [Level(*level) for level in zip(*numbers, strict=True)]


def level_of_log_snr(schedule: "Schedule", log_snr: float) -> Level:
    return levels(schedule, schedule.t_of_log_snr(torch.tensor([log_snr], dtype=torch.float64)))[0]
