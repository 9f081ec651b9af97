"""DDIM and, with eta = 1, ancestral sampling of DDPM (Song, Meng and Ermon 2021; Ho, Jain and Abbeel 2020)."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from torch import Tensor

from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.variances import Estimate, FixedSmall, ReverseStep
from diffusion_trainer.sampling.solvers import Solver


class _Plan(NamedTuple):
    level: Level
    step: ReverseStep
    variance: Callable[[Estimate], float | Tensor] | None  # Var[x_0 | x_t]; None: a step without noise


@dataclass(frozen=True)
class DDIM(Solver):
    """x_s = alpha_s x_0_hat + sqrt(sigma_s^2 - v) eps_hat + sqrt(v) z with v = eta^2 beta-tilde (eq. 12 and 16).

    eta 0 is the deterministic map, first-order accurate for the probability-flow ODE; it is also Euler's method in
    sigma / alpha, and in t of a rectified flow. eta 1 is ancestral sampling, and the "Euler ancestral" of sigma space.
    The reverse variance adds its own part to the noise, c^2 Var[x_0 | x_t] with c the coefficient of x_0_hat: from
    beta to Analytic-DDPM and Analytic-DDIM (Bao et al. 2022, theorem 1).
    """

    eta: float = 0.0
    order: ClassVar[int] = 1
    uses_variance: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], not {self.eta}")

    @property
    def deterministic(self) -> bool:
        return self.eta == 0

    def plan(self, schedule, times, variance):
        quiet = self.eta == 0 and variance == FixedSmall()
        return [
            _Plan(t, ReverseStep.of(t, s, self.eta), None if quiet else variance.at(t, s))
            for t, s in pairwise(levels(schedule, times))
        ]

    def step(self, denoise, x, plan, state, noise):
        estimate = denoise(x, plan.level)
        mean = estimate.combined(plan.step.of_x_t, x, plan.step.of_x_0)
        if plan.variance is None:
            return mean, state
        variance = plan.step.variance(plan.variance(estimate))
        if isinstance(variance, Tensor):
            return mean + variance.to(x.dtype).sqrt() * noise(), state
        return (mean.add_(noise(), alpha=variance**0.5) if variance != 0 else mean), state
