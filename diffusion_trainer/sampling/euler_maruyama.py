"""The reverse-time SDE (Song et al. 2021b, eq. 6) by the method of Euler and Maruyama."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.sampling.solvers import Denoise, Noise, Solver


class ScoreStep(NamedTuple):
    """x_s = drift x_t + variance score + sqrt(variance) z, with score = (alpha_t x_0_hat - x_t) / sigma_t^2."""

    level: Level
    of_x_t: float
    of_x_0: float
    added: float  # sqrt(variance)

    @classmethod
    def of(cls, t: Level, drift: float, variance: float) -> "ScoreStep":
        towards = variance / t.sigma**2
        return cls(t, drift - towards, towards * t.alpha, variance**0.5)

    def __call__(self, denoise: Denoise, x: Tensor, noise: Noise) -> Tensor:
        mean = denoise(x, self.level).combined(self.of_x_t, x, self.of_x_0)
        return mean.add_(noise(), alpha=self.added)


def refuse_pure_noise(solver: Solver, schedule: Schedule, first: Level) -> None:
    if not first.alpha:
        raise ValueError(
            f"{type(solver).__name__} cannot serve {type(schedule).__name__}: alpha is 0 at its noisy end, "
            f"t = {first.t:g}, where the reverse SDE's drift is infinite; use sampler=ddim, ancestral or heun, or a "
            "schedule whose alpha stays positive"
        )


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """dx = (f x - g^2 score) dt + g dw backwards in the schedule's own time, f = d log alpha / dt and
    g^2 = d sigma^2 / dt - 2 f sigma^2 at the start of each step. Weak order 1, one call a step.

    It wants many more steps than `DDIM(eta=1)`, which knows the linear part of the SDE exactly: even the mean is only
    right to first order where alpha moves, and the first steps overshoot where alpha almost vanishes at the noisy end
    (`Cosine` has f near -1 / (1 - t_max) there). ValueError for a schedule whose alpha is 0 there.
    """

    order: ClassVar[int] = 1

    @property
    def deterministic(self) -> bool:
        return False

    def plan(self, schedule, times, variance):
        schedule = schedule.frozen()
        at = levels(schedule, times)
        refuse_pure_noise(self, schedule, at[0])
        f, g_squared = _rates(schedule, times[:-1])
        spans = (times[:-1] - times[1:]).tolist()
        return [
            ScoreStep.of(t, 1 - h * drift, h * rate)
            for t, h, drift, rate in zip(at[:-1], spans, f.tolist(), g_squared.tolist(), strict=True)
        ]

    def step(self, denoise, x, plan, state, noise):
        return plan(denoise, x, noise), state


def _rates(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """f and g^2 at t, (N,) each."""
    alpha, d_alpha = jvp(schedule.alpha, (t,), (torch.ones_like(t),))
    sigma, d_sigma = jvp(schedule.sigma, (t,), (torch.ones_like(t),))
    f = d_alpha / alpha
    return f, 2 * sigma * (d_sigma - f * sigma)
