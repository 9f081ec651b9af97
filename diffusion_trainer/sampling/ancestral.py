"""Ancestral sampling of DDPM (Ho, Jain and Abbeel 2020)."""

from dataclasses import dataclass
from typing import ClassVar

from diffusion_trainer.process.variances import ReverseVariance, transition_variance
from diffusion_trainer.sampling.solvers import Solver


@dataclass(frozen=True)
class Ancestral(Solver):
    """x_s ~ N(mean of q(x_s | x_t, x_0_hat), v)  (Ho et al. 2020, eq. 7; its last step adds no noise)."""

    variance: ReverseVariance
    order: ClassVar[int] = 1

    def step(self, denoise, schedule, x, t, s, state, noise):
        alpha_t, sigma_t = float(schedule.alpha(t)), float(schedule.sigma(t))
        alpha_s, sigma_s = float(schedule.alpha(s)), float(schedule.sigma(s))
        beta = float(transition_variance(schedule, t, s))
        x_0_hat = denoise(x, t)
        mean = (alpha_s * beta / sigma_t**2) * x_0_hat + (alpha_t / alpha_s * sigma_s**2 / sigma_t**2) * x
        if sigma_s == 0:
            return mean, state
        return mean + float(self.variance(schedule, t, s)) ** 0.5 * noise(), state
