"""DPM-Solver++ (Lu et al. 2022b): exponential integrators of x_0_hat over half_log_snr, which grows by h in a step.

All of them are exact in the linear part of x_s = (sigma_s / sigma_t) x_t + sigma_s int e^half_log_snr x_0_hat (their
eq. 8). Where a level has no signal h is infinite: the step from there is DDIM's, and later ones do not look back to it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, sqrt
from typing import ClassVar, NamedTuple

import torch

from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import ReverseStep
from diffusion_trainer.sampling.solvers import Combination, Solver


def usable(known: Sequence[Level], s: Level) -> Sequence[Level]:
    """Of the levels with an estimate, newest first: those between which a step to s can interpolate in half_log_snr."""
    if not (isfinite(known[0].half_log_snr) and isfinite(s.half_log_snr)):
        return known[:1]
    return [level for level in known if isfinite(level.half_log_snr)]


def euler(t: Level, s: Level) -> Combination:
    """x_0_hat is taken for constant: DDIM (Lu et al. 2022b, section 4.1)."""
    step = ReverseStep.of(t, s, eta=0)
    return Combination(step.of_x_t, (step.of_x_0,))


def extrapolated(known: Sequence[Level], s: Level) -> Combination:
    """2M: x_0_hat is that of the step's middle, on the line through the two newest (Lu et al. 2022b, algorithm 2)."""
    t, step = known[0], euler(known[0], s)
    if len(known) == 1:
        return step
    half_inverse_r = (s.half_log_snr - t.half_log_snr) / (t.half_log_snr - known[1].half_log_snr) / 2
    (of_x_0,) = step.weights
    return Combination(step.of_x, (of_x_0 * (1 + half_inverse_r), -of_x_0 * half_inverse_r))


def interpolated(nodes: Sequence[Level], t: Level, s: Level) -> Combination:
    """The step from t to s that is exact where x_0_hat is a polynomial of half_log_snr through all the nodes.

    In tau = (half_log_snr - half_log_snr_t) / h the integrals of tau^k are alpha_s M_k: M_0 = 1 - e^-h and, by parts,
    M_k = 1 - k M_(k-1) / h. They are phi functions (Lu et al. 2022b, appendix; Zhao et al. 2023, eq. 7-9, where B(h)
    cancels). Cancellation at small h is harmless: M_k goes with a k-th divided difference, which is small as h^k.
    """
    h, step = s.half_log_snr - t.half_log_snr, euler(t, s)
    integrals = list(step.weights)
    for k in range(1, len(nodes)):
        integrals.append(s.alpha - k / h * integrals[-1])
    tau = [(node.half_log_snr - t.half_log_snr) / h for node in nodes]
    return Combination(step.of_x, tuple(_quadrature(tau, integrals)))


def _quadrature(nodes: Sequence[float], integrals: Sequence[float]) -> list[float]:
    """The weights w with sum_i w_i nodes_i^k = integrals_k, k < N (Bjorck and Pereyra 1970, the primal algorithm).

    In Python's floats: a plan has one for each step, and a solver of linear systems takes ten times as long to start.
    """
    w, n = list(integrals), len(nodes)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            w[i] -= nodes[k] * w[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            w[i] /= nodes[i] - nodes[i - k - 1]
        for i in range(k, n - 1):
            w[i] -= w[i + 1]
    return w


class _Plan(NamedTuple):
    level: Level
    combination: Combination
    noise: float  # its standard deviation


@dataclass(frozen=True)
class _Multistep(Solver):
    """One call of the network a step, and its estimates at earlier levels."""

    def plan(self, schedule, times, variance):
        at = levels(schedule, times)
        known = [at[max(0, i + 1 - self.history) : i + 1][::-1] for i in range(len(at) - 1)]
        return [self._plan(usable(k, s), s) for k, s in zip(known, at[1:], strict=True)]

    @abstractmethod
    def _plan(self, known: Sequence[Level], s: Level) -> _Plan:
        """known: the usable levels, newest first, at most `history`; fewer in the first steps."""

    def init(self):
        return ()

    def step(self, denoise, x, plan, state, noise):
        estimates = (denoise(x, plan.level), *state)
        x = plan.combination(x, estimates)
        return (x.add_(noise(), alpha=plan.noise) if plan.noise > 0 else x), estimates[: self.history - 1]


@dataclass(frozen=True)
class DPMSolverPP2M(_Multistep):
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2); the first step is DDIM's."""

    order: ClassVar[int] = 2
    history: ClassVar[int] = 2

    def _plan(self, known, s):
        return _Plan(known[0], extrapolated(known, s), 0.0)


@dataclass(frozen=True)
class DPMSolverPP3M(_Multistep):
    """DPM-Solver++ with three estimates (Lu et al. 2022b, section 4.2 with k = 3); it starts with DDIM and 2M.

    Their code has half of the second difference that the parabola has, which leaves second order; this is the parabola.
    The error of the DDIM step is of second order, h^2 SNR(t_max), but made once: it shows where h is below that SNR.
    """

    order: ClassVar[int] = 3
    history: ClassVar[int] = 3

    def _plan(self, known, s):
        three = len(known) == 3
        return _Plan(known[0], interpolated(known, known[0], s) if three else extrapolated(known, s), 0.0)


@dataclass(frozen=True)
class DPMSolverPPSDE2M(_Multistep):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, appendix; their eq. 20): ancestral sampling on the extrapolated x_0_hat.

    Of second order in law, measured on Gaussians: the noise of this step, which the estimates along it would see, is
    lacking, but the line through the last two carries that of the last step on, and of those there are as many.
    """

    order: ClassVar[int] = 2
    history: ClassVar[int] = 2

    @property
    def deterministic(self) -> bool:
        return False

    def _plan(self, known, s):
        t, (of_x, weights) = known[0], extrapolated(known, s)
        exp_minus_h = t.alpha * s.sigma / (s.alpha * t.sigma)
        # alpha_s (1 - e^-2h) instead of alpha_s (1 - e^-h): times 1 + e^-h.
        drift = Combination(of_x * exp_minus_h, tuple(weight * (1 + exp_minus_h) for weight in weights))
        return _Plan(t, drift, s.sigma * sqrt(1 - exp_minus_h**2))


class _SinglePlan(NamedTuple):
    level: Level
    to_middle: Combination
    middle: Level | None  # None where the step is DDIM's
    combination: Combination


@dataclass(frozen=True)
class DPMSolverPP2S(Solver):
    """DPM-Solver++(2S), r = 1/2 (Lu et al. 2022b, algorithm 1): x_0_hat of the middle in log-SNR. Two calls a step."""

    order: ClassVar[int] = 2

    def plan(self, schedule, times, variance):
        at = levels(schedule, times)
        return [
            _SinglePlan(t, euler(t, middle or s), middle, euler(t, s))
            for (t, s), middle in zip(pairwise(at), _middles(schedule, at), strict=True)
        ]

    def step(self, denoise, x, plan, state, noise):
        estimate = denoise(x, plan.level)
        if plan.middle is not None:
            estimate = denoise(plan.to_middle(x, (estimate,)), plan.middle)
        return plan.combination(x, (estimate,)), state


def _middles(schedule: Schedule, at: Sequence[Level]) -> list[Level | None]:
    """The level in the middle of each step in log-SNR; None where that is not finite."""
    log_snr = torch.tensor([t.half_log_snr + s.half_log_snr for t, s in pairwise(at)], dtype=torch.float64)
    finite = log_snr.isfinite()
    found = iter(levels(schedule, schedule.t_of_log_snr(log_snr[finite])))
    return [next(found) if there else None for there in finite.tolist()]
