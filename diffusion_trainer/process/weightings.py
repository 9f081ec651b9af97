"""Weights of the training loss. One space for all: a weighting multiplies |x_0_hat - x_0|^2."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import ReverseVariance, transition_variance


class Weighting(ABC):
    @abstractmethod
    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        """(B,) -> (B,)."""


@dataclass(frozen=True)
class Unit(Weighting):
    """Unit weight on |eps_hat - eps|^2, that is the SNR on the error of x_0: L_simple (Ho et al. 2020, eq. 14)."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return schedule.log_snr(t).exp()


@dataclass(frozen=True)
class Elbo(Weighting):
    """num_timesteps times KL(q(x_s|x_t,x_0) || p(x_s|x_t)), s = t - 1/num_timesteps, per unit of |x_0_hat - x_0|^2.

    Ho et al. 2020, eq. 8 and 12, for a reverse variance that is fixed. The mean of the loss over t uniform on k/T is
    the sum of the KL terms, in nats; over t uniform on the schedule's range it is close to it (some per cent lower, for
    the first steps weigh most). The first step (s = 0) stands for the decoder: its variance, zero for `FixedSmall`, is
    that of the second. `num_timesteps` is that of the discrete process whose bound is meant.
    """

    variance: ReverseVariance
    num_timesteps: int = 1000

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, not {self.num_timesteps}")

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        step = 1 / self.num_timesteps
        s = (t - step).clamp(min=0)
        # x_0's coefficient in the mean of q(x_s | x_t, x_0), Ho et al. 2020, eq. 7.
        coefficient = schedule.alpha(s) * transition_variance(schedule, t, s) / schedule.sigma(t) ** 2
        later = t.clamp(min=2 * step)
        variance = self.variance(schedule, later, later - step)
        return self.num_timesteps * coefficient**2 / (2 * variance)
