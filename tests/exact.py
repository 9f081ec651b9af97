"""The oracle behind the package's seams: a perfect denoiser and a perfect network."""

from dataclasses import dataclass

import torch
from oracle import Mixture

from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.schedules import Schedule

GAUSSIAN = Mixture.gaussian([0.5, -1.0], [[0.5, 0.2], [0.2, 0.3]])
MIXTURE = Mixture([0.3, 0.7], [[1.0, 0.5], [-1.0, -0.2]], [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.3]]])


@dataclass(frozen=True)
class ExactDenoiser(Denoiser):
    """E[x_0 | x_t, condition]; the condition is the number of a component, and the null one is one past the last."""

    data: Mixture
    schedule: Schedule

    def __call__(self, x_t, t, condition):
        t = t[0] if bool((t == t[0]).all()) else t  # one noise level for all: the oracle is faster
        level = self.schedule.alpha(t), self.schedule.sigma(t)
        estimate = self.data.denoise(x_t, *level)
        if condition is not None:
            for k in range(len(self.data.weights)):
                given_k = self.data.conditional(k).denoise(x_t, *level)
                estimate = torch.where((condition == k)[:, None], given_k, estimate)
        return estimate.to(x_t.dtype)

    def null(self, condition):
        return None if condition is None else torch.full_like(condition, len(self.data.weights))


@dataclass(frozen=True)
class ExactNetwork:
    """eps_hat = E[eps | x_t] = -sigma score; it learns the noise level from c_noise = log_snr / 4 alone."""

    data: Mixture

    def __call__(self, x, c_noise, condition=None):
        log_snr = 4 * c_noise.double()
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        return (-sigma[:, None] * self.data.score(x.double(), alpha, sigma)).to(x.dtype)
