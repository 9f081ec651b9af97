"""Where a sampler evaluates: decreasing times from the noisy end of the range to 0."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_trainer.process.schedules import Schedule


class Grid(ABC):
    @abstractmethod
    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        """(num_steps + 1,) float64, strictly decreasing, first t_range[1], last 0."""


@dataclass(frozen=True)
class UniformTime(Grid):
    """Equal steps of t (DDIM's linear sub-sequence, Song et al. 2021, appendix D.2)."""

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        return torch.linspace(schedule.t_range[1], 0, num_steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class UniformLogSNR(Grid):
    """Equal steps of log-SNR down to the clean end of the range, then one to 0 (Lu et al. 2022, section 3.3)."""

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        low, high = schedule.t_range
        ends = schedule.log_snr(torch.tensor([high, low], dtype=torch.float64)).tolist()
        inner = schedule.t_of_log_snr(torch.linspace(*ends, num_steps, dtype=torch.float64))
        inner[0] = high  # exactly, whatever the rounding of the inverse
        return torch.cat([inner, torch.zeros(1, dtype=torch.float64)])
