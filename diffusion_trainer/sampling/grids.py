"""Where a sampler evaluates: decreasing times from the noisy end of the range to 0."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_trainer.process.schedules import Schedule

# Where the noisy end has less than this (nothing, with zero terminal SNR), its point is spaced as if it had this much:
# what more steps from there could still improve is some 1e-6 of the data.
LEAST_LOG_SNR = -14.0


class Grid(ABC):
    @abstractmethod
    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        """(num_steps + 1,) float64, strictly decreasing, first t_range[1], last 0.

        ValueError where it has no such times.
        """


@dataclass(frozen=True)
class UniformTime(Grid):
    """Equal steps of t (DDIM's linear sub-sequence, Song et al. 2021, appendix D.2). The last positive time is
    t_max / num_steps.
    """

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        return torch.linspace(schedule.t_range[1], 0, num_steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Quadratic(Grid):
    """t = t_max (i / N)^2 (Song et al. 2021, appendix D.2).

    Where that would end below t_min it is equal steps of sqrt(t) down to t_min.
    """

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        low, high = schedule.t_range
        roots = torch.linspace(high**0.5, max(low**0.5, high**0.5 / num_steps), num_steps, dtype=torch.float64)
        return _from_to_0(high, roots**2)


@dataclass(frozen=True)
class UniformLogSNR(Grid):
    """Equal steps of log-SNR down to the clean end of the range, then one to 0 (Lu et al. 2022, section 3.3)."""

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        ends = _log_snr_of_range(schedule).tolist()
        log_snr = torch.linspace(*ends, num_steps, dtype=torch.float64)
        return _from_to_0(schedule.t_range[1], schedule.t_of_log_snr(log_snr))


@dataclass(frozen=True)
class Karras(Grid):
    """Equal steps of (sigma / alpha)^(1 / rho) down to the clean end, then one to 0 (Karras et al. 2022, eq. 5)."""

    rho: float = 7.0

    def __post_init__(self):
        if not self.rho > 0:
            raise ValueError(f"rho must be positive (1 is uniform in sigma, 7 the paper's), not {self.rho}")

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        ends = (-_log_snr_of_range(schedule) / (2 * self.rho)).exp().tolist()
        roots = torch.linspace(*ends, num_steps, dtype=torch.float64)
        return _from_to_0(schedule.t_range[1], schedule.t_of_log_snr(-2 * self.rho * roots.log()))


@dataclass(frozen=True)
class Trailing(Grid):
    """Steps round(T - i T / N) of the T = num_timesteps of a discrete process: it starts at the noisiest and
    ends in a whole stride (Lin et al. 2024, table 2).
    """

    num_timesteps: int = 1000

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        if num_steps > self.num_timesteps:
            raise ValueError(f"num_steps={num_steps} is more than num_timesteps={self.num_timesteps}")
        i = torch.arange(num_steps, dtype=torch.float64)
        steps = (self.num_timesteps - i * self.num_timesteps / num_steps).round()
        return _of_discrete(schedule, steps, self.num_timesteps)


@dataclass(frozen=True)
class SubSequence(Grid):
    """The given steps of a discrete process, 1..num_timesteps, in either order.

    Step num_timesteps is the noisy end of the range. Without it sampling starts from less noise than there can be, as
    if nothing of the data were left there.
    """

    steps: Sequence[int]
    num_timesteps: int = 1000

    def __post_init__(self):
        if not all(1 <= k <= self.num_timesteps for k in self.steps):
            raise ValueError(f"steps must lie in 1..num_timesteps={self.num_timesteps}, not {list(self.steps)}")
        if len(set(self.steps)) < len(self.steps):
            raise ValueError(f"steps must differ from each other, not {list(self.steps)}")

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        if num_steps != len(self.steps):
            raise ValueError(f"num_steps={num_steps}, but {len(self.steps)} steps are given: they must be as many")
        return _of_discrete(schedule, torch.tensor(sorted(self.steps, reverse=True)), self.num_timesteps)


def _from_to_0(first: float, times: Tensor) -> Tensor:
    """The times with the first exactly what it is, whatever the rounding of an inverse, and 0 after the last."""
    return torch.cat([times.new_tensor([first]), times[1:], times.new_zeros(1)])


def _log_snr_of_range(schedule: Schedule) -> Tensor:
    """At its noisy end (not below LEAST_LOG_SNR) and at its clean one, (2,)."""
    low, high = schedule.t_range
    return schedule.log_snr(torch.tensor([high, low], dtype=torch.float64)).clamp(min=LEAST_LOG_SNR)


def _of_discrete(schedule: Schedule, steps: Tensor, num_timesteps: int) -> Tensor:
    """steps: (N,), decreasing."""
    noisiest, times = schedule.t_range[1], steps.double() / num_timesteps
    first = noisiest if steps[0] == num_timesteps else times[0].item()
    times = _from_to_0(first, times)
    if first > noisiest or not (times.diff() < 0).all():
        raise ValueError(
            f"the steps next to {num_timesteps} lie at or beyond the schedule's noisy end t_max={noisiest}: "
            "take fewer, or a t_max of 1"
        )
    return times
