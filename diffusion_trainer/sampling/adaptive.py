"""Adaptive integration of the probability-flow ODE."""

from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.levels import Level, level_of_log_snr, levels
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.sampling.runge_kutta import Point, in_flow
from diffusion_trainer.sampling.solvers import Solver

MAX_STEPS = 10_000  # of one integration: a tolerance below the rounding of x would have it go on for ever


class _Plan(NamedTuple):
    schedule: Schedule
    t: Level
    s: Level

    def at(self, p: float) -> Point:
        """Where p = sigma / (alpha + sigma); never beyond the ends, where the choice of the first step may look."""
        low, high = sorted((in_flow(self.t), in_flow(self.s)), key=lambda point: point.u)
        if p <= low.u:
            return low
        return high if p >= high.u else in_flow(level_of_log_snr(self.schedule, 2 * log((1 - p) / p)))


@dataclass(frozen=True)
class DormandPrince(Solver):
    """dopri5 with an error of each of its steps below atol + rtol |z|, for z = x / (alpha + sigma) of every sample.

    Dormand and Prince 1980, as Song et al. 2021b, appendix D.4, use it; in the coordinate of `runge_kutta`. One step of
    the grid is one integration, so a grid of t_max and t_min leaves all the choice to the method. Other solvers never
    wait for the device: this one reads an error norm after each of its steps, and p at each call. Its steps are as
    small as the hardest sample of the batch needs: sample i is a function of (seed, i) only to within the tolerance.

    UserError if the steps get too small: estimates that are not finite, or a tolerance below the rounding of x.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    order: ClassVar[int] = 5

    def __post_init__(self):
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rtol and atol must be positive, not {self.rtol} and {self.atol}")

    def plan(self, schedule, times, variance):
        schedule = schedule.frozen()  # it is asked at each call
        return [_Plan(schedule, t, s) for t, s in pairwise(levels(schedule, times))]

    def step(self, denoise, x, plan, state, noise):
        start, end = in_flow(plan.t), in_flow(plan.s)

        def slope(p: Tensor, z: Tensor) -> Tensor:
            point = plan.at(p.item())
            return (z - denoise(point.scale * z, point.level).x_0_hat) / point.u

        ends = torch.tensor([start.u, end.u], dtype=torch.float64, device=x.device)
        # step_t: the last step stops at the end instead of passing it, where there may be no level.
        options = {"norm": _largest_rms, "step_t": ends[1:], "max_num_steps": MAX_STEPS}
        try:
            z = odeint(slope, x / start.scale, ends, rtol=self.rtol, atol=self.atol, method="dopri5", options=options)
        except AssertionError as error:  # how odeint says that it cannot go on
            raise UserError(
                f"DormandPrince gave up between t = {plan.t.t:g} and {plan.s.t:g} ({error}): the network returns "
                f"inf or NaN, or rtol={self.rtol} and atol={self.atol} are too small for {x.dtype}"
            ) from error
        return end.scale * z[-1], state


def _largest_rms(error: Tensor) -> Tensor:
    """(B, ...) -> (), of the worst sample: the mean over a batch would let some of its samples pass the tolerance."""
    return error.flatten(1).square().mean(1).max().sqrt()
