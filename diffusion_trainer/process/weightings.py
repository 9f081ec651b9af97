"""Weights of the training loss. One space for all: a weighting multiplies |x_0_hat - x_0|^2.

What a paper multiplies with |eps_hat - eps|^2 stands here times the SNR: the two errors are in that ratio.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import FixedLarge, FixedSmall, PosteriorVariance, ReverseStep


class Weighting(ABC):
    invariant: ClassVar[bool] = False  # the mean loss over t is the same for all schedules with the same ends

    @abstractmethod
    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        """level: tensors (B,) -> (B,)."""


def snr(level: Level) -> Tensor:
    return (level.alpha / level.sigma) ** 2


@dataclass(frozen=True)
class Unit(Weighting):
    """Unit weight on |eps_hat - eps|^2, that is the SNR on the error of x_0: L_simple (Ho et al. 2020, eq. 14)."""

    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        return snr(level)


@dataclass(frozen=True)
class UnitX0(Weighting):
    """Unit weight on |x_0_hat - x_0|^2 (Salimans and Ho 2022, section 4, "SNR weighting" being `Unit`)."""

    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        return torch.ones_like(level.alpha)


@dataclass(frozen=True)
class UnitV(Weighting):
    """Unit weight on |v_hat - v|^2: SNR + 1 (Salimans and Ho 2022, section 4)."""

    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        return snr(level) + 1


@dataclass(frozen=True)
class UnitFlow(Weighting):
    """Unit weight on the error of the velocity eps - x_0: (1 + alpha / sigma)^2 (Liu et al. 2023, eq. 1)."""

    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        return (1 + level.alpha / level.sigma) ** 2


@dataclass(frozen=True)
class Elbo(Weighting):
    """num_timesteps times KL(q(x_s|x_t,x_0) || p(x_s|x_t)), s = t - 1/num_timesteps, per unit of |x_0_hat - x_0|^2.

    Ho et al. 2020, eq. 8 and 12, for a reverse variance that is fixed. The mean of the loss over t uniform on k/T is
    the sum of the KL terms, in nats; over t uniform on the schedule's range it is close to it (some per cent lower, for
    the first steps weigh most). The first step (s = 0) stands for the decoder: its variance, zero for `FixedSmall`, is
    that of the second. `num_timesteps` is that of the discrete process whose bound is meant.
    """

    variance: PosteriorVariance
    num_timesteps: int = 1000

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, not {self.num_timesteps}")
        if not isinstance(self.variance, FixedSmall | FixedLarge):
            raise ValueError(f"variance must be fixed, beta or beta-tilde, not {type(self.variance).__name__}")

    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        t, step = level.t.double(), 1 / self.num_timesteps  # neighbouring levels are nearly equal: float64
        of_x_0 = ReverseStep.of(schedule.level(t), schedule.level((t - step).clamp(min=0))).of_x_0
        later = t.clamp(min=2 * step)
        ends = schedule.level(later), schedule.level(later - step)
        variance = ReverseStep.of(*ends).variance(self.variance.at(*ends)(None))
        return (self.num_timesteps * of_x_0**2 / (2 * variance)).to(level.t.dtype)


@dataclass(frozen=True)
class ContinuousElbo(Weighting):
    """-d log_snr/dt / 2 on the error of the noise, times the length of the range of t: the loss averaged over t uniform
    is the diffusion part of the bound in continuous time, in nats per dimension (Kingma et al. 2021, eq. 17).
    """

    invariant: ClassVar[bool] = True

    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        low, high = schedule.t_range
        return (high - low) / 2 * schedule.snr_rate(level.t)


@dataclass(frozen=True)
class Sigmoid(Weighting):
    """The continuous bound times sigmoid(bias - log_snr), whatever the schedule (Kingma and Gao 2023, section 4 and
    table 1; Hoogeboom et al. 2024).
    """

    invariant: ClassVar[bool] = True
    bias: float = 2.0

    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        return ContinuousElbo()(schedule, level) * torch.sigmoid(self.bias - snr(level).log())


@dataclass(frozen=True)
class MinSNR(Weighting):
    """min(SNR, gamma) on the error of x_0 (Hang et al. 2023, eq. 8), whatever the network predicts."""

    gamma: float = 5.0

    def __post_init__(self):
        _positive(self.gamma, "gamma")

    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        return snr(level).clamp(max=self.gamma)


@dataclass(frozen=True)
class SoftMinSNR(Weighting):
    """1 / (1/SNR + 1/gamma) on the error of x_0 (Crowson et al. 2024, section 3.4)."""

    gamma: float = 4.0

    def __post_init__(self):
        _positive(self.gamma, "gamma")

    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        ratio = snr(level)
        return ratio * self.gamma / (ratio + self.gamma)


@dataclass(frozen=True)
class P2(Weighting):
    """1 / (k + SNR)^gamma on the error of the noise (Choi et al. 2022, eq. 8)."""

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self):
        _positive(self.k, "k")
        if not self.gamma >= 0:
            raise ValueError(f"gamma must not be negative, not {self.gamma}")

    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        ratio = snr(level)
        return ratio / (self.k + ratio) ** self.gamma


@dataclass(frozen=True)
class EDMWeight(Weighting):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = SNR + 1/sigma_data^2 (Karras et al. 2022, table 1, their sigma
    being sigma / alpha): unit weight on the error of the preconditioned network's output.
    """

    sigma_data: float = 0.5

    def __post_init__(self):
        _positive(self.sigma_data, "sigma_data")

    def __call__(self, schedule: Schedule, level: Level) -> Tensor:
        return snr(level) + self.sigma_data**-2


def _positive(value: float, name: str) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, not {value}")
