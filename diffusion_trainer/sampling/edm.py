"""The stochastic sampler of Karras et al. 2022, algorithm 2."""

from dataclasses import dataclass
from itertools import pairwise
from math import inf, log, sqrt
from typing import ClassVar, NamedTuple

import torch

from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import ReverseStep
from diffusion_trainer.sampling.runge_kutta import TRAPEZOIDAL, LinearStep, Point
from diffusion_trainer.sampling.solvers import Combination, Solver

STEEP = 6  # sigma / alpha before a step over that after it


class _Plan(NamedTuple):
    raised: float  # alpha at sigma_hat / alpha_t: what x_t is multiplied by
    added: float  # the deviation of the noise that is added to the product
    step: LinearStep


@dataclass(frozen=True)
class EDMHeun(Solver):
    """Adds noise up to sigma_hat = sigma (1 + gamma), then takes a step of Heun's method in sigma.

    On schedules whose alpha is not 1 it is the same on x / alpha and sigma / alpha, which `s_min` and `s_max` are in.
    gamma = min(churn / num_steps, sqrt(2) - 1) where s_min <= sigma <= s_max, else 0; the noise is s_noise times as
    large as it should be, against what a network loses. sigma_hat never exceeds sigma(t_max), the largest the network
    was trained for (the paper's may). With churn 0 it is deterministic, of order 2. Two calls a step.

    A step in which sigma / alpha falls more than sixfold, from infinity where alpha is 0, is Euler's (DDIM's): half of
    the slope at its far end, where sigma is small, would throw x far off. On the paper's grid of its schedule it takes
    less than 14 steps to have one. Measured on Gaussians of 64 dimensions, on every schedule and three grids in 2 to 12
    steps, 990 cases (2026-11-27): the errors of draws, in the data's deviations, are 28,000 at most with a median of
    0.51 without that, 1.4 and 0.36 if it takes tenfold, 0.98 and 0.32 as it is, 0.98 and 0.32 at fourfold; 504 are
    smaller than without by 5% or more, 28 larger. Steps of an encoding, in which sigma rises, are all Heun's, which is
    no gain for the way there and back: 366 of those errors are smaller, 175 larger, by up to ten times.
    """

    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = inf
    s_noise: float = 1.0
    order: ClassVar[int] = 2

    def __post_init__(self):
        if not self.churn >= 0:
            raise ValueError(f"churn must not be negative (0 adds no noise), not {self.churn}")
        if not 0 <= self.s_min <= self.s_max:
            raise ValueError(f"0 <= s_min <= s_max must hold, not s_min={self.s_min}, s_max={self.s_max}")
        if not self.s_noise > 0:
            raise ValueError(f"s_noise must be positive (1 is as much as sigma_hat says), not {self.s_noise}")

    @property
    def deterministic(self) -> bool:
        return self.churn == 0

    def plan(self, schedule, times, variance):
        at = levels(schedule, times)
        # The paper's N counts the jump to 0 as well, which is the sampler's.
        raised = self._raised(schedule, at[:-1], num_steps=len(at))
        return [self._planned(t, hat, s) for (t, s), hat in zip(pairwise(at), raised, strict=True)]

    def _raised(self, schedule: Schedule, at: list[Level], num_steps: int) -> list[Level]:
        """The levels at sigma_hat; the given ones where that is sigma."""
        gamma = min(self.churn / num_steps, sqrt(2) - 1)
        top, out = _sigma(schedule.at_noisy_end), list(at)
        hats = {i: min(_sigma(t) * (1 + gamma), top) for i, t in enumerate(at) if self.s_min <= _sigma(t) <= self.s_max}
        hats = {i: hat for i, hat in hats.items() if hat > _sigma(at[i])}
        log_snr = torch.tensor([-2 * log(hat) for hat in hats.values()], dtype=torch.float64)
        for i, level in zip(hats, levels(schedule, schedule.t_of_log_snr(log_snr)), strict=True):
            out[i] = level
        return out

    def _planned(self, t: Level, hat: Level, s: Level) -> _Plan:
        if not (t.alpha and s.alpha):  # s: of an encoding
            return _Plan(1.0, 0.0, _euler(t, s))
        added = self.s_noise * hat.alpha * sqrt(max(_sigma(hat) ** 2 - _sigma(t) ** 2, 0))
        return _Plan(hat.alpha / t.alpha, added, _euler(hat, s) if _sigma(hat) > STEEP * _sigma(s) else _heun(hat, s))

    def step(self, denoise, x, plan, state, noise):
        if plan.added > 0:
            x = torch.add(plan.raised * x, noise(), alpha=plan.added)
        return plan.step(denoise, x), state


def _heun(t: Level, s: Level) -> LinearStep:
    points = [Point(level, level.alpha, _sigma(level)) for level in (t, s)]
    return LinearStep.of(TRAPEZOIDAL, points, points[1])


def _euler(t: Level, s: Level) -> LinearStep:
    step = ReverseStep.of(t, s, eta=0)
    return LinearStep(t, (), Combination(step.of_x_t, (step.of_x_0,)))


def _sigma(level: Level) -> float:
    """sigma / alpha: the sigma of Karras et al."""
    return level.sigma / level.alpha if level.alpha else inf
