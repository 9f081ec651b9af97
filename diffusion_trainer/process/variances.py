"""Variances of the reverse step x_t -> x_s, s < t, as used by ancestral samplers and by the variational bound."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from diffusion_trainer.process.schedules import Schedule


def transition_variance(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Var[x_t | x_s] = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2; for neighbours of a discrete DDPM it is beta_t."""
    # sigma_t^2 (1 - SNR_t / SNR_s): the ratio is 0 at s = 0, which needs no case of its own.
    ratio = schedule.alpha(t) * schedule.sigma(s) / (schedule.alpha(s) * schedule.sigma(t))
    return schedule.sigma(t) ** 2 * (1 - ratio**2)


class ReverseVariance(ABC):
    @abstractmethod
    def __call__(self, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
        """Variance of the reverse step from t to s, in the shape of t."""


@dataclass(frozen=True)
class FixedSmall(ReverseVariance):
    """beta-tilde, the variance of q(x_s | x_t, x_0); optimal for data in one point (Ho et al. 2020, eq. 7)."""

    def __call__(self, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
        return transition_variance(schedule, t, s) * (schedule.sigma(s) / schedule.sigma(t)) ** 2


@dataclass(frozen=True)
class FixedLarge(ReverseVariance):
    """beta, the variance of q(x_t | x_s); optimal for x_0 ~ N(0, I) (Ho et al. 2020, section 3.2)."""

    def __call__(self, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
        return transition_variance(schedule, t, s)
