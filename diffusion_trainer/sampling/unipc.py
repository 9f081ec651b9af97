"""UniPC: a predictor, and a corrector that costs no call of the network (Zhao et al. 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.variances import Estimate
from diffusion_trainer.sampling.dpm_solver import euler, extrapolated, interpolated, usable
from diffusion_trainer.sampling.solvers import Combination, Solver


class _Plan(NamedTuple):
    level: Level
    correct: Combination | None  # of the last step, again: from the x that it began with
    predict: Combination


@dataclass(frozen=True)
class UniPC(Solver):
    """UniP of predictor_order p with UniC, on x_0_hat, B(h) = e^h - 1 (Zhao et al. 2023, algorithms 5 and 6).

    The estimate at the end of a step corrects that step, and the next one goes on from there without another. Order
    p + 1: with p = 3 the first correction is one order worse, as in `DPMSolverPP3M`. With weak guidance 3 is the better
    choice, with strong 2 (their section 4.2).
    """

    predictor_order: int = 2
    keeps_x: ClassVar[bool] = True

    def __post_init__(self):
        if self.predictor_order not in (2, 3):
            raise ValueError(f"predictor_order must be 2 or 3, not {self.predictor_order}")

    @property
    def order(self) -> int:
        return self.predictor_order + 1

    @property
    def history(self) -> int:
        return self.predictor_order

    def plan(self, schedule, times, variance):
        at = levels(schedule, times)
        known = [at[max(0, i + 1 - self.history) : i + 1][::-1] for i in range(len(at) - 1)]
        nodes = [usable(k, s) for k, s in zip(known, at[1:], strict=True)]
        correct = [None, *(_corrector(n, s) for n, s in zip(nodes, at[1:], strict=True))]
        return [_Plan(n[0], c, _predictor(n, s)) for n, c, s in zip(nodes, correct[:-1], at[1:], strict=True)]

    def init(self):
        return None, ()

    def step(self, denoise, x, plan, state, noise):
        before, estimates = state
        # x_0_hat itself: four combinations or more use it.
        estimates = (Estimate(denoise(x, plan.level).x_0_hat), *estimates)
        if plan.correct is not None:
            x = plan.correct(before, estimates)
        return plan.predict(x, estimates), (x, estimates[: self.history])


def _predictor(nodes: Sequence[Level], s: Level) -> Combination:
    """UniP-p, p = len(nodes). With a_1 = 1/2, as the paper sets it, UniP-2 is the step of 2M."""
    return interpolated(nodes, nodes[0], s) if len(nodes) > 2 else extrapolated(nodes, s)


def _corrector(nodes: Sequence[Level], s: Level) -> Combination:
    """UniC-p from nodes[0] to s, p = len(nodes); weights for x_0_hat at s first. UniC-1 has a_1 = 1/2."""
    if len(nodes) > 1:
        return interpolated([s, *nodes], nodes[0], s)
    of_x, (of_x_0,) = euler(nodes[0], s)
    return Combination(of_x, (of_x_0 / 2, of_x_0 / 2))
