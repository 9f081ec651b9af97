"""Predictor-corrector sampling (Song et al. 2021b, algorithms 2 to 5)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.linalg import vector_norm

from diffusion_trainer.conventions import expand
from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.variances import transition_variance
from diffusion_trainer.sampling.euler_maruyama import ScoreStep, refuse_pure_noise
from diffusion_trainer.sampling.solvers import Denoise, Noise, Solver


@dataclass(frozen=True)
class ReverseDiffusion(Solver):
    """x_s = (2 - a) x_t + beta score + sqrt(beta) z, a = alpha_t / alpha_s, beta = Var[x_t | x_s] (eq. 46).

    The predictors of algorithm 2 (VE: a = 1) and of algorithm 3 (VP: a = sqrt(1 - beta)). One call a step. As of
    `EulerMaruyama`, the mean is only right to first order where alpha moves. ValueError for a schedule whose alpha is 0
    at the noisy end.
    """

    order: ClassVar[int] = 1

    @property
    def deterministic(self) -> bool:
        return False

    def plan(self, schedule, times, variance):
        at = levels(schedule, times)
        refuse_pure_noise(self, schedule, at[0])
        return [ScoreStep.of(t, 2 - t.alpha / s.alpha, transition_variance(t, s)) for t, s in pairwise(at)]

    def step(self, denoise, x, plan, state, noise):
        return plan(denoise, x, noise), state


class _Plan(NamedTuple):
    predictor: Any
    level: Level  # where the corrector works
    step_size: float  # its, over (|z| / |score|)^2


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """Each step of `predictor` is followed by `corrector_steps` of Langevin dynamics at the level where it ends.

    x + eps score + sqrt(2 eps) z with eps = 2 (alpha_t / alpha_s)^2 (signal_to_noise |z| / |score|)^2 (algorithms 4 and
    5; the factor is 1 for VE). The norms are those of one sample, so that no sample depends on its company (the paper's
    code takes their means over the batch). One call for each corrector step, besides the predictor's.

    The corrector has errors of its own, whatever the number of steps: a relative one of signal_to_noise^2 in the
    variance, and since eps depends on x and z one of 4 / D with D dimensions; it is meant for images, not for points.
    """

    predictor: Solver  # not UniPC
    corrector_steps: int = 1
    signal_to_noise: float = 0.16

    def __post_init__(self):
        if self.predictor.keeps_x:
            raise ValueError(
                f"predictor must not be {type(self.predictor).__name__}, which takes its last step again and so "
                "undoes the corrector's; use DPMSolverPP2M"
            )
        if self.corrector_steps < 1:
            raise ValueError(
                f"corrector_steps must be at least 1, not {self.corrector_steps}; none at all is {self.predictor}"
            )
        if not self.signal_to_noise > 0:
            raise ValueError(f"signal_to_noise must be positive, not {self.signal_to_noise}")

    @property
    def order(self) -> int:
        return self.predictor.order

    @property
    def history(self) -> int:
        return self.predictor.history

    @property
    def uses_variance(self) -> bool:
        return self.predictor.uses_variance

    @property
    def deterministic(self) -> bool:
        return False

    def check(self, precision):
        self.predictor.check(precision)

    def init(self):
        return self.predictor.init()

    def plan(self, schedule, times, variance):
        steps = pairwise(levels(schedule, times))
        return [
            _Plan(plan, s, 2 * (t.alpha / s.alpha * self.signal_to_noise) ** 2)
            for plan, (t, s) in zip(self.predictor.plan(schedule, times, variance), steps, strict=True)
        ]

    def step(self, denoise, x, plan, state, noise):
        x, state = self.predictor.step(denoise, x, plan.predictor, state, noise)
        for _ in range(self.corrector_steps):
            x = _langevin(denoise, x, plan, noise)
        return x, state


def _langevin(denoise: Denoise, x: Tensor, plan: _Plan, noise: Noise) -> Tensor:
    _, alpha, sigma = plan.level
    score = denoise(x, plan.level).combined(-1 / sigma**2, x, alpha / sigma**2)
    z = noise()
    eps = expand(plan.step_size * (_norms(z) / _norms(score)) ** 2, x)
    return x + eps * score + (2 * eps).sqrt() * z


def _norms(x: Tensor) -> Tensor:
    """(B, ...) -> (B,)"""
    return vector_norm(x.flatten(1), dim=1)
