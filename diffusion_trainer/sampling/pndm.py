"""Pseudo numerical methods: classical coefficients on eps_hat, with DDIM's step in the place of a straight line."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from torch import Tensor

from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.variances import Estimate, ReverseStep
from diffusion_trainer.sampling.solvers import Denoise, Solver

# Adams and Bashforth's, the newest first.
_LINEAR_MULTISTEP = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class Transfer(NamedTuple):
    """phi(x, eps', t, s) = alpha_s / alpha_t x + (sigma_s - sigma_t alpha_s / alpha_t) eps' (Liu et al. 2022, eq. 11),
    eps' = sum_i weights[i] eps[i] with eps[0] the eps_hat that belongs to x and x_0_hat.

    Written as DDIM's step with x_0_hat and a correction by eps' - eps_hat, which is left out where sigma / alpha falls
    more than fourfold, as it does next to a noisy end with little or no signal: the step is far from linear in t there,
    and would multiply the error of eps' by the ratio.
    """

    of_x: float
    of_x_0: float
    of_eps: tuple[float, ...]  # of eps[1:]; eps[0] is in the first two

    @classmethod
    def of(cls, t: Level, s: Level, weights: Sequence[float]) -> "Transfer":
        ddim = ReverseStep.of(t, s, eta=0)
        if _steep(t, s):
            return cls(ddim.of_x_t, ddim.of_x_0, ())
        gain = s.sigma - t.sigma * s.alpha / t.alpha
        change = gain * (weights[0] - 1) / t.sigma  # eps[0] is (x - alpha x_0_hat) / sigma
        of_eps = tuple(gain * weight for weight in weights[1:])
        return cls(ddim.of_x_t + change, ddim.of_x_0 - change * t.alpha, of_eps)

    def __call__(self, x: Tensor, estimate: Estimate, eps: Sequence[Tensor]) -> Tensor:
        """eps: eps[1:]; more may be at hand than there are weights."""
        out = estimate.combined(self.of_x, x, self.of_x_0)
        for of_e, e in zip(self.of_eps, eps, strict=False):
            out.add_(e, alpha=of_e)
        return out


def _steep(t: Level, s: Level) -> bool:
    return t.sigma * s.alpha > 4 * s.sigma * t.alpha  # without a division: alpha may be 0


class _RungeKutta(NamedTuple):
    """Liu et al. 2022, eq. 13: the classical method with four estimates, the first of them at hand."""

    middle: Level  # halfway in t
    end: Level
    to_middle: tuple[Transfer, Transfer]  # on the first eps_hat, and on the second
    to_end: Transfer  # on the third
    result: Transfer  # on all four

    @classmethod
    def of(cls, t: Level, middle: Level, s: Level) -> "_RungeKutta":
        to_middle = Transfer.of(t, middle, (1.0,)), Transfer.of(t, middle, (0.0, 1.0))
        return cls(middle, s, to_middle, Transfer.of(t, s, (0.0, 1.0)), Transfer.of(t, s, (1 / 6, 2 / 6, 2 / 6, 1 / 6)))

    def __call__(self, denoise: Denoise, x: Tensor, first: Estimate) -> Tensor:
        eps_2 = _eps_hat(denoise, self.to_middle[0](x, first, ()), self.middle)
        eps_3 = _eps_hat(denoise, self.to_middle[1](x, first, (eps_2,)), self.middle)
        eps_4 = _eps_hat(denoise, self.to_end(x, first, (eps_3,)), self.end)
        return self.result(x, first, (eps_2, eps_3, eps_4))


def _eps_hat(denoise: Denoise, x: Tensor, level: Level) -> Tensor:
    return denoise(x, level).eps_hat(x, level)


class _Plan(NamedTuple):
    level: Level
    transfer: Transfer
    runge_kutta: _RungeKutta | None  # instead of it


@dataclass(frozen=True)
class _Pseudo(Solver):
    """Of second order in equal steps of t, whatever that of the coefficients (Liu et al. 2022, section 3.5): they know
    nothing of the curve of sigma / alpha, except where that is linear in t (`EDM`). On other grids of first order. On
    `UniformTime`, whose last times fall as steps get shorter, of second order over the whole range on `VE`, `SubVP` and
    `LearnedSchedule`, elsewhere from 0.6 (`ConstantBeta`: sigma / alpha goes as sqrt(t) at 0) to 1.9.
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
        # Where the correction is left out there is nothing that three more estimates could change.
        runge_kutta = i < self.warm_up and not _steep(t, s)
        transfer = Transfer.of(t, s, _LINEAR_MULTISTEP[min(i, 3)])
        return _Plan(t, transfer, _RungeKutta.of(t, middle, s) if runge_kutta else None)

    def init(self):
        return ()

    def step(self, denoise, x, plan, state, noise):
        estimate = denoise(x, plan.level)
        eps = (estimate.eps_hat(x, plan.level), *state)[: self.history - 1]
        if plan.runge_kutta is None:
            return plan.transfer(x, estimate, state), eps
        return plan.runge_kutta(denoise, x, estimate), eps


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
