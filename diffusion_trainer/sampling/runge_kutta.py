"""Explicit Runge-Kutta methods for the probability-flow ODE, in a coordinate in which it is finite from noise to data.

With p = sigma / (alpha + sigma) and z = x / (alpha + sigma), z is (1 - p) x_0 + p eps, and the probability-flow ODE of
every schedule (Song et al. 2021b, eq. 13) is dz/dp = eps_hat - x_0_hat: the velocity of a rectified flow, finite at
p = 1 (no signal) and p = 0 (no noise). On `RectifiedFlow` p is t and z is x; on every schedule Euler's method in p is
DDIM with eta = 0.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isclose, log
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.sampling.solvers import Combination, Denoise, Solver


@dataclass(frozen=True)
class Tableau:
    """An explicit method of order 2 or more: k_i = f(u + c_i h, z + h sum_j a_ij k_j), then z + h sum_i b_i k_i.

    Row i of `a` has the i entries before the diagonal.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def __post_init__(self):
        if not (len(self.a) == len(self.b) == len(self.c) and all(len(row) == i for i, row in enumerate(self.a))):
            raise ValueError(f"a must be strictly lower triangular, with as many rows as b and c have entries: {self}")
        if not all(isclose(sum(row), c, abs_tol=1e-12) for row, c in zip(self.a, self.c, strict=True)):
            raise ValueError(f"each row of a must sum to its c: {self}")
        # Hairer, Norsett and Wanner 1993, section II.1, eq. 1.9 and theorem 2.1: the conditions of order 1 and 2.
        if not isclose(sum(self.b), 1):
            raise ValueError(f"b must sum to 1: {self}")
        if not isclose(sum(b * c for b, c in zip(self.b, self.c, strict=True)), 0.5):
            raise ValueError(f"b . c must be 1/2: {self}")


class Point(NamedTuple):
    """A level in a coordinate u such that z = x / scale obeys dz/du = (z - x_0_hat) / u."""

    level: Level
    scale: float
    u: float


def in_flow(level: Level) -> Point:
    """u = p, see above: eps_hat - x_0_hat = (x - (alpha + sigma) x_0_hat) / sigma = (z - x_0_hat) / p."""
    scale = level.alpha + level.sigma
    return Point(level, scale, level.sigma / scale)


class LinearStep(NamedTuple):
    """A step that combines x with the estimates made on its way, in their order."""

    level: Level  # of x, where the first estimate is made
    stages: tuple[tuple[Level, Combination], ...]  # where each further one is made, and of which combination
    result: Combination

    @classmethod
    def of(cls, tableau: Tableau, points: Sequence[Point], end: Point) -> "LinearStep":
        """One step of a Runge-Kutta method from points[0] to end; points: where its stages are."""
        # z and its slopes are linear in x and the estimates: here they are lists of coefficients.
        z = [1 / points[0].scale] + [0.0] * len(points)
        h, slopes, stages = end.u - points[0].u, [], []
        for i, (point, row) in enumerate(zip(points, tableau.a, strict=True)):
            z_i = _moved(z, h, row, slopes)
            stages.append((point.level, _scaled(point.scale, z_i[: i + 1])))
            z_i[i + 1] -= 1  # less x_0_hat_i
            slopes.append([value / point.u for value in z_i])
        return cls(points[0].level, tuple(stages[1:]), _scaled(end.scale, _moved(z, h, tableau.b, slopes)))

    def __call__(self, denoise: Denoise, x: Tensor) -> Tensor:
        estimates = [denoise(x, self.level)]
        for level, combination in self.stages:
            estimates.append(denoise(combination(x, estimates), level))
        return self.result(x, estimates)


def _moved(z: list[float], h: float, weights: tuple[float, ...], slopes: list[list[float]]) -> list[float]:
    return [value + h * sum(w * k[j] for w, k in zip(weights, slopes, strict=True)) for j, value in enumerate(z)]


def _scaled(scale: float, z: list[float]) -> Combination:
    return Combination(scale * z[0], tuple(scale * value for value in z[1:]))


def between(schedule: Schedule, at: Sequence[Level], part: float) -> list[Level]:
    """For each of the steps between the N levels, the level that lies `part` of the way along p: N - 1 of them."""
    if part in (0, 1):  # themselves, whatever the rounding of the inverse; no log-SNR is needed where alpha is 0
        return list(at[1:] if part else at[:-1])
    log_snr = []
    for (_, alpha, sigma), (_, alpha_s, sigma_s) in pairwise(at):
        of_t, of_s = (1 - part) / (alpha + sigma), part / (alpha_s + sigma_s)
        # 1 - p and p, without the difference
        log_snr.append(2 * log((of_t * alpha + of_s * alpha_s) / (of_t * sigma + of_s * sigma_s)))
    return levels(schedule, schedule.t_of_log_snr(torch.tensor(log_snr, dtype=torch.float64)))


class RungeKutta(Solver):
    """The step of all methods; one of them is its tableau. As many calls of the denoiser a step as b has entries."""

    @property
    @abstractmethod
    def tableau(self) -> Tableau: ...

    def plan(self, schedule, times, variance):
        at = levels(schedule, times)
        stages = [between(schedule, at, part) for part in self.tableau.c]
        return [
            LinearStep.of(self.tableau, [in_flow(level) for level in points], in_flow(s))
            for s, *points in zip(at[1:], *stages, strict=True)
        ]

    def step(self, denoise, x, plan, state, noise):
        return plan(denoise, x), state


TRAPEZOIDAL = Tableau(a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0))
MIDPOINT = Tableau(a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5))


@dataclass(frozen=True)
class Heun(RungeKutta):
    """The mean of the slopes at both ends of the step, the second at Euler's guess of it. Two calls a step, order 2."""

    order: ClassVar[int] = 2
    tableau: ClassVar[Tableau] = TRAPEZOIDAL


@dataclass(frozen=True)
class Midpoint(RungeKutta):
    """The slope half-way along p, at Euler's guess of the point there. Two calls a step, order 2."""

    order: ClassVar[int] = 2
    tableau: ClassVar[Tableau] = MIDPOINT
