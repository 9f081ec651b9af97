"""Pseudo numerical methods: classical coefficients on eps_hat, with DDIM's step in the place of a straight line."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from torch import Tensor

from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.variances import ReverseStep
from diffusion_trainer.sampling.solvers import Denoise, Solver

# Adams and Bashforth's, the newest first.
_LINEAR_MULTISTEP = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class Transfer(NamedTuple):
    """phi(x, eps', t, s) = alpha_s / alpha_t x + (sigma_s - sigma_t alpha_s / alpha_t) eps' (Liu et al. 2022, eq. 11).

    Written as DDIM's step with x_0_hat and a correction by eps' - eps_hat, which is left out where sigma / alpha falls
    more than fourfold, as it does next to a noisy end with little or no signal: the step is far from linear in t there,
    and would multiply the error of eps' by the ratio.
    """

    ddim: ReverseStep
    gain: float

    @classmethod
    def of(cls, t: Level, s: Level) -> "Transfer":
        steep = t.sigma * s.alpha > 4 * s.sigma * t.alpha
        return cls(ReverseStep.of(t, s, eta=0), 0.0 if steep else s.sigma - t.sigma * s.alpha / t.alpha)

    def __call__(self, x: Tensor, x_0_hat: Tensor, weights: Sequence[float], eps: Sequence[Tensor]) -> Tensor:
        """eps' = sum_i weights[i] eps[i], eps[0] being the eps_hat that belongs to x_0_hat."""
        out = (self.ddim.of_x_t * x).add_(x_0_hat, alpha=self.ddim.of_x_0)
        changes = (weights[0] - 1, *weights[1:])
        for change, e in zip(changes, eps, strict=False):
            if self.gain * change != 0:
                out.add_(e, alpha=self.gain * change)
        return out


def _estimates(denoise: Denoise, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """x_0_hat and eps_hat."""
    x_0_hat = denoise(x, level).x_0_hat
    return x_0_hat, (x / level.sigma).add_(x_0_hat, alpha=-level.alpha / level.sigma)


class _Middle(NamedTuple):
    """For a Runge-Kutta step: the level halfway in t, the way there, and the level of the end."""

    level: Level
    transfer: Transfer
    end: Level


class _Plan(NamedTuple):
    level: Level
    transfer: Transfer
    weights: Sequence[float]
    middle: _Middle | None


@dataclass(frozen=True)
class _Pseudo(Solver):
    """Of second order in equal steps of t, whatever that of the coefficients (Liu et al. 2022, section 3.5): they know
    nothing of the curve of sigma / alpha, except where that is linear in t (`EDM`). On other grids of first order; less
    than second on `UniformTime` as well where sigma / alpha goes as sqrt(t) at its last times, as with `ConstantBeta`.
    """

    order: ClassVar[int] = 2
    history: ClassVar[int] = 4
    warm_up: ClassVar[int]  # how many steps are Runge and Kutta's

    def plan(self, schedule, times, variance):
        at = levels(schedule, times)
        middles = levels(schedule, (times[1:] + times[:-1]) / 2)
        steps = zip(pairwise(at), middles, strict=True)
        return [self._plan(i, t, middle, s) for i, ((t, s), middle) in enumerate(steps)]

    def _plan(self, i: int, t: Level, middle: Level, s: Level) -> _Plan:
        transfer, weights = Transfer.of(t, s), _LINEAR_MULTISTEP[min(i, 3)]
        # Where the correction is left out there is nothing that three more estimates could change.
        runge_kutta = i < self.warm_up and transfer.gain != 0
        return _Plan(t, transfer, weights, _Middle(middle, Transfer.of(t, middle), s) if runge_kutta else None)

    def init(self):
        return ()

    def step(self, denoise, x, plan, state, noise):
        x_0_hat, eps_hat = _estimates(denoise, x, plan.level)
        eps = (eps_hat, *state)[: self.history]
        if plan.middle is None:
            return plan.transfer(x, x_0_hat, plan.weights, eps), eps
        return _runge_kutta(denoise, x, x_0_hat, eps_hat, plan), eps


def _runge_kutta(denoise: Denoise, x: Tensor, x_0_hat: Tensor, eps_1: Tensor, plan: _Plan) -> Tensor:
    """Liu et al. 2022, eq. 13, of which the first of four estimates is given."""
    middle, way, transfer, end = plan.middle.level, plan.middle.transfer, plan.transfer, plan.middle.end
    _, eps_2 = _estimates(denoise, way(x, x_0_hat, (1.0,), (eps_1,)), middle)
    _, eps_3 = _estimates(denoise, way(x, x_0_hat, (0.0, 1.0), (eps_1, eps_2)), middle)
    _, eps_4 = _estimates(denoise, transfer(x, x_0_hat, (0.0, 1.0), (eps_1, eps_3)), end)
    return transfer(x, x_0_hat, (1 / 6, 2 / 6, 2 / 6, 1 / 6), (eps_1, eps_2, eps_3, eps_4))


@dataclass(frozen=True)
class PNDM(_Pseudo):
    """Liu et al. 2022, algorithm 2: three steps of Runge and Kutta with four calls each, then linear multistep."""

    warm_up: ClassVar[int] = 3


@dataclass(frozen=True)
class IPNDM(_Pseudo):
    """As PNDM, but it starts with the multistep formulas of order 1 to 3: one call a step (Zhang and Chen 2023, DEIS,
    section 3.2).
    """

    warm_up: ClassVar[int] = 0
