"""DDIM (Song, Meng and Ermon 2021)."""

from dataclasses import dataclass
from typing import ClassVar

from diffusion_trainer.process.variances import FixedSmall
from diffusion_trainer.sampling.solvers import Solver


@dataclass(frozen=True)
class DDIM(Solver):
    """x_s = alpha_s x_0_hat + sqrt(sigma_s^2 - v) eps_hat + sqrt(v) z,  v = eta^2 beta-tilde  (eq. 12 and 16).

    eta = 0 is the deterministic map, first-order accurate for the probability-flow ODE; eta = 1 is ancestral sampling
    with the small variance.
    """

    eta: float = 0.0
    order: ClassVar[int] = 1

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], not {self.eta}")

    def step(self, denoise, schedule, x, t, s, state, noise):
        x_0_hat = denoise(x, t)
        eps_hat = (x - float(schedule.alpha(t)) * x_0_hat) / float(schedule.sigma(t))
        variance = self.eta**2 * float(FixedSmall()(schedule, t, s))
        kept = max(float(schedule.sigma(s)) ** 2 - variance, 0.0) ** 0.5
        x = float(schedule.alpha(s)) * x_0_hat + kept * eps_hat
        return (x + variance**0.5 * noise() if variance > 0 else x), state
