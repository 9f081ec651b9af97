"""The oracle behind the package's seams: a perfect denoiser and a perfect network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracle import Mixture

from diffusion_trainer.conventions import expand
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.predictions import EDM, Prediction
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import Estimate

GAUSSIAN = Mixture.gaussian([0.5, -1.0], [[0.5, 0.2], [0.2, 0.3]])
MIXTURE = Mixture([0.3, 0.7], [[1.0, 0.5], [-1.0, -0.2]], [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.3]]])


@dataclass(frozen=True)
class ExactDenoiser(Denoiser):
    """E[x_0 | x_t, condition]; the condition is the number of a component, and the null one is one past the last."""

    data: Mixture

    def __call__(self, x_t, level, condition):
        at = torch.tensor(level.alpha, dtype=torch.float64), torch.tensor(level.sigma, dtype=torch.float64)
        estimate = self.data.denoise(x_t, *at)
        if condition is not None:
            for k in range(len(self.data.weights)):
                given_k = self.data.conditional(k).denoise(x_t, *at)
                estimate = torch.where((condition == k)[:, None], given_k, estimate)
        return Estimate(estimate.to(x_t.dtype))

    def null(self, condition):
        return None if condition is None else torch.full_like(condition, len(self.data.weights))


@dataclass(frozen=True)
class Pixels(Denoiser):
    """Of images (B, n, D) whose pixels are independent draws of `data`."""

    data: Mixture

    def __call__(self, x_t, level, condition):
        return Estimate(ExactDenoiser(self.data)(x_t.flatten(0, 1), level, None).x_0_hat.reshape(x_t.shape))

    def null(self, condition):
        return None


@dataclass(frozen=True)
class Says(Denoiser):
    """x_0_hat is any function of x_t."""

    x_0_hat: Callable

    def __call__(self, x_t, level, condition):
        return Estimate(self.x_0_hat(x_t))

    def null(self, condition):
        return condition


@dataclass(frozen=True)
class ExactNetwork:
    """The F of which x_0_hat = E[x_0 | x_t], for any schedule and prediction, (B, D).

    It is told the noise level by c_noise alone, and finds the time by the inverse of the schedule.
    """

    data: Mixture
    schedule: Schedule
    prediction: Prediction

    def __call__(self, x, c_noise, condition=None):
        log_snr = c_noise.double() * (-8 if isinstance(self.prediction, EDM) else 4)
        t = self.schedule.t_of_log_snr(log_snr).clamp(*self.schedule.t_range)
        level = Level(t, self.schedule.alpha(t), self.schedule.sigma(t))
        c = self.prediction.coefficients(self.schedule, level)
        x_t = x.double() / expand(c.into, x.double())
        x_0_hat = self.data.denoise(x_t, level.alpha, level.sigma)
        return self.prediction.target(x_0_hat, x_t, c).to(x.dtype)
