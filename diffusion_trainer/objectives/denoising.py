"""The denoising objective: one formula for every schedule, prediction and weighting."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from diffusion_trainer.conventions import Draws, expand
from diffusion_trainer.process.predictions import Prediction
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.timesteps import Timesteps
from diffusion_trainer.process.weightings import Weighting


class LossTerms(NamedTuple):
    """Of each sample, all (B,): the loss to average, the unweighted error of F, the time and its log-SNR."""

    loss: Tensor
    error: Tensor
    t: Tensor
    log_snr: Tensor


@dataclass(frozen=True)
class Denoising:
    """w(t) |x_0_hat - x_0|^2 per dimension (Ho et al. 2020, eq. 12 and 14, in one space of weights)."""

    schedule: Schedule
    prediction: Prediction
    timesteps: Timesteps
    weighting: Weighting

    def __call__(self, network: Callable, x_0: Tensor, condition: Tensor | None, draws: Draws) -> LossTerms:
        """network: (x, c_noise, condition) -> F; x_0: (B, ...) in the network's space."""
        t, importance = self.timesteps(self.schedule.t_range, draws)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x_t = expand(alpha, x_0) * x_0 + expand(sigma, x_0) * draws.normal("eps", tuple(x_0.shape[1:]))
        c = self.prediction.coefficients(alpha, sigma)
        output = network(expand(c.into, x_t) * x_t, c.noise, condition).float()
        error = (output - self.prediction.target(x_0, x_t, c)).square().flatten(1).mean(1)
        # |x_0_hat - x_0|^2 = out^2 |F - target|^2: the same number without dividing by a small alpha and back.
        weight = importance * self.weighting(self.schedule, t) * c.out**2
        return LossTerms(weight * error, error, t, 2 * (alpha / sigma).log())
