"""What the network's raw output F means, as four coefficients of the denoised estimate (Karras et al. 2022, eq. 7)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from diffusion_trainer.conventions import expand
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import ReverseStep

MAX_LOG_SNR = 30.0  # what the network is told stays finite where signal or noise vanishes; beyond conf's schedules


class Coefficients(NamedTuple):
    """x_0_hat = skip * x_t + out * F(into * x_t, noise); each of shape (B,), or a float."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


class Prediction(ABC):
    """A prediction is its coefficients; target and estimate follow, here and nowhere else."""

    needs_signal: bool = False  # x_0_hat is not defined where alpha is 0

    @abstractmethod
    def coefficients(self, schedule: Schedule, level: Level) -> Coefficients:
        """level: tensors (B,)."""

    def target(self, x_0: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The F, (B, ...), that makes x_0_hat equal x_0."""
        return (x_0 - expand(c.skip, x_t) * x_t) / expand(c.out, x_t)

    def check(self, schedule: Schedule) -> None:
        """ValueError if x_0_hat is not defined everywhere on the schedule's range."""
        if self.needs_signal and schedule.at_noisy_end.alpha == 0:
            raise ValueError(
                f"{type(self).__name__} cannot serve {type(schedule).__name__}: alpha is 0 at its noisy end, where the "
                "output says nothing of x_0; use prediction=v, x_0 or flow"
            )


def c_noise(level: Level) -> Tensor:
    """log_snr / 4, within bounds: -2 times that of Karras et al. 2022, table 1 (their sigma is sigma / alpha)."""
    return 2 * (level.alpha / level.sigma).log().clamp(-MAX_LOG_SNR / 2, MAX_LOG_SNR / 2) / 4


@dataclass(frozen=True)
class Epsilon(Prediction):
    """F = eps_hat, so x_0_hat = (x_t - sigma eps_hat) / alpha (Ho et al. 2020, eq. 15)."""

    needs_signal = True

    def coefficients(self, schedule: Schedule, level: Level) -> Coefficients:
        _, alpha, sigma = level
        return Coefficients(1 / alpha, -sigma / alpha, alpha.new_ones(alpha.shape), c_noise(level))


@dataclass(frozen=True)
class X0(Prediction):
    """F = x_0_hat (Ho et al. 2020, section 3.2; Salimans and Ho 2022, section 4)."""

    def coefficients(self, schedule: Schedule, level: Level) -> Coefficients:
        one = level.alpha.new_ones(level.alpha.shape)
        return Coefficients(0 * one, one, one, c_noise(level))


@dataclass(frozen=True)
class V(Prediction):
    """F = alpha eps - sigma x_0 (Salimans and Ho 2022, section 4), on any schedule: x_t is divided by the square root
    of alpha^2 + sigma^2 on its way in, and v is that of the rescaled, variance-preserving process.
    """

    def coefficients(self, schedule: Schedule, level: Level) -> Coefficients:
        _, alpha, sigma = level
        square = alpha**2 + sigma**2
        return Coefficients(alpha / square, -sigma / square**0.5, square**-0.5, c_noise(level))


@dataclass(frozen=True)
class Score(Prediction):
    """F = the score, -eps_hat / sigma, so x_0_hat = (x_t + sigma^2 F) / alpha (Tweedie; Song et al. 2021, eq. 7)."""

    needs_signal = True

    def coefficients(self, schedule: Schedule, level: Level) -> Coefficients:
        _, alpha, sigma = level
        return Coefficients(1 / alpha, sigma**2 / alpha, alpha.new_ones(alpha.shape), c_noise(level))


@dataclass(frozen=True)
class PosteriorMean(Prediction):
    """F = mean of q(x_s | x_t, x_0_hat), s = t - 1 / num_timesteps: "mu-tilde" (Ho et al. 2020, eq. 7 and 8).

    In the first step s is 0 and F is x_0_hat itself.
    """

    num_timesteps: int = 1000

    def __post_init__(self):
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps must be positive, not {self.num_timesteps}")

    def coefficients(self, schedule: Schedule, level: Level) -> Coefficients:
        # In float64: the coefficient of x_0 is the small difference of two numbers near 1.
        t = level.t.double()
        step = ReverseStep.of(schedule.level(t), schedule.level((t - 1 / self.num_timesteps).clamp(min=0)))
        skip, out = -step.of_x_t / step.of_x_0, 1 / step.of_x_0
        one = level.alpha.new_ones(level.alpha.shape)
        return Coefficients(skip.to(one.dtype), out.to(one.dtype), one, c_noise(level))


@dataclass(frozen=True)
class Flow(Prediction):
    """F = eps - x_0, the velocity of rectified flow (Liu et al. 2023, eq. 1; Lipman et al. 2023, eq. 23).

    Where alpha + sigma = 1 it is along dx_t/dt; on other schedules along that of x_t / (alpha + sigma).
    """

    def coefficients(self, schedule: Schedule, level: Level) -> Coefficients:
        _, alpha, sigma = level
        total = alpha + sigma
        return Coefficients(1 / total, -sigma / total, 1 / total, c_noise(level))


@dataclass(frozen=True)
class EDM(Prediction):
    """Preconditioning of Karras et al. 2022 (table 1, column "Ours"): inputs and targets of unit variance for data of
    standard deviation sigma_data. Their sigma is our sigma / alpha, their x is our x_t / alpha.
    """

    sigma_data: float = 0.5

    def __post_init__(self):
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, not {self.sigma_data}")

    def coefficients(self, schedule: Schedule, level: Level) -> Coefficients:
        _, alpha, sigma = level
        square = sigma**2 + (alpha * self.sigma_data) ** 2  # of c_in, whose alpha cancels that of x_t / alpha
        return Coefficients(
            alpha * self.sigma_data**2 / square,
            sigma * self.sigma_data / square**0.5,
            square**-0.5,
            -c_noise(level) / 2,  # log(sigma / alpha) / 4
        )
