"""Where a sampler evaluates: decreasing times from the noisy end of the range to 0."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

from diffusion_trainer.process.schedules import Schedule

# Where the noisy end has less than this (nothing, with zero terminal SNR), its point is spaced as if it had this much:
# what more steps from there could still improve is some 1e-6 of the data.
LEAST_LOG_SNR = -14.0


class Grid(ABC):
    @abstractmethod
    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        """(num_steps + 1,) float64, strictly decreasing, first t_range[1], last 0, none of the others below t_range[0].

        ValueError where it has no such times.
        """


@dataclass(frozen=True)
class UniformTime(Grid):
    """t = t_max i / N: equal steps (DDIM's linear sub-sequence, Song et al. 2021, appendix D.2).

    Where that would end below t_min, in more than t_max / t_min steps, it is equal steps down to t_min, then one to 0.
    """

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        low, high = schedule.t_range
        return _to_0(schedule, torch.linspace(high, max(low, high / num_steps), num_steps, dtype=torch.float64))


@dataclass(frozen=True)
class Quadratic(Grid):
    """t = t_max (i / N)^2 (Song et al. 2021, appendix D.2).

    Where that would end below t_min it is equal steps of sqrt(t) down to t_min.
    """

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        low, high = schedule.t_range
        roots = torch.linspace(high**0.5, max(low**0.5, high**0.5 / num_steps), num_steps, dtype=torch.float64)
        return _to_0(schedule, roots**2)


@dataclass(frozen=True)
class UniformLogSNR(Grid):
    """Equal steps of log-SNR down to the clean end of the range, then one to 0 (Lu et al. 2022, section 3.3)."""

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        ends = _log_snr_of_range(schedule).tolist()
        log_snr = torch.linspace(*ends, num_steps, dtype=torch.float64)
        return _to_0(schedule, schedule.t_of_log_snr(log_snr))


@dataclass(frozen=True)
class Karras(Grid):
    """Equal steps of (sigma / alpha)^(1 / rho) down to the clean end, then one to 0 (Karras et al. 2022, eq. 5)."""

    rho: float = 7.0

    def __post_init__(self):
        if not self.rho > 0:
            raise ValueError(f"rho must be positive (1 is uniform in sigma, 7 the paper's), not {self.rho}")

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        noisy, clean = _log_snr_of_range(schedule).tolist()
        # Relative to the noisy end's, so that no rho is too small for them.
        roots = torch.linspace(1, exp((noisy - clean) / (2 * self.rho)), num_steps, dtype=torch.float64)
        return _to_0(schedule, schedule.t_of_log_snr(noisy - 2 * self.rho * roots.log()))


@dataclass(frozen=True)
class Trailing(Grid):
    """Steps round(T - i T / N) of the T = num_timesteps of a discrete process: it starts at the noisiest and
    ends in a whole stride (Lin et al. 2024, table 2).
    """

    num_timesteps: int = 1000

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        times = self._times(schedule, num_steps)
        if not _within(schedule, times):
            raise ValueError(f"num_steps={num_steps} {self._refusal(schedule)}")
        return times

    def _times(self, schedule: Schedule, num_steps: int) -> Tensor:
        i = torch.arange(num_steps, dtype=torch.float64)
        steps = (self.num_timesteps - i * self.num_timesteps / num_steps).round()
        return _of_discrete(schedule, steps, self.num_timesteps)

    def _refusal(self, schedule: Schedule) -> str:
        # More steps only bring the second nearer to the noisy end, and the last nearer to 0.
        numbers = range(1, self.num_timesteps + 1)
        most = bisect_left(numbers, True, key=lambda n: not _within(schedule, self._times(schedule, n)))
        low, high = schedule.t_range
        return (
            f"trailing steps of num_timesteps={self.num_timesteps} do not lie apart between t_min={low:g} and "
            f"t_max={high:g}: take at most {most}"
        )


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
        times = _of_discrete(schedule, torch.tensor(sorted(self.steps, reverse=True)), self.num_timesteps)
        if not _within(schedule, times):
            low, high = schedule.t_range
            raise ValueError(
                f"steps {min(self.steps)} to {max(self.steps)} of num_timesteps={self.num_timesteps} must lie between "
                f"t_min={low:g} and t_max={high:g}, where step {self.num_timesteps} is t_max"
            )
        return times


def _to_0(schedule: Schedule, times: Tensor) -> Tensor:
    """(N,) -> (N + 1,): the first exactly t_max and none below t_min, whatever the rounding of an inverse, then 0."""
    low, high = schedule.t_range
    times = torch.cat([times.new_tensor([high]), times[1:].clamp(min=low), times.new_zeros(1)])
    if not _within(schedule, times):
        raise ValueError(
            f"this grid has no num_steps={len(times) - 1} different times between t_min={low:g} and t_max={high:g}: "
            "take fewer"
        )
    return times


def _within(schedule: Schedule, times: Tensor) -> bool:
    """Whether times (N + 1,), of which the last is 0, decrease, and the others lie in the range of the schedule."""
    low, high = schedule.t_range
    return bool(times[0] <= high and times[-2] >= low and (times.diff() < 0).all())


def _log_snr_of_range(schedule: Schedule) -> Tensor:
    """At its noisy end (not below LEAST_LOG_SNR) and at its clean one, (2,)."""
    low, high = schedule.t_range
    return schedule.log_snr(torch.tensor([high, low], dtype=torch.float64)).clamp(min=LEAST_LOG_SNR)


def _of_discrete(schedule: Schedule, steps: Tensor, num_timesteps: int) -> Tensor:
    """steps: (N,), decreasing -> (N + 1,): their times, and 0. Step num_timesteps is the noisy end."""
    times = torch.where(steps == num_timesteps, schedule.t_range[1], steps.double() / num_timesteps)
    return torch.cat([times, times.new_zeros(1)])
