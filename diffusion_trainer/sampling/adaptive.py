"""Adaptive integration of the probability-flow ODE."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.levels import Level, level_of_log_snr, levels
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.sampling.runge_kutta import Point, in_flow
from diffusion_trainer.sampling.solvers import Solver

MAX_CALLS = 10_000  # of the network in one integration: smooth estimates need some 60 at 1e-5, 3,000 at 1e-15


class Flow(NamedTuple):
    """The probability-flow ODE from one level to another, either way, in the coordinate p of `runge_kutta`."""

    schedule: Schedule
    start: Level
    end: Level

    def at(self, p: float) -> Point:
        """Where p = sigma / (alpha + sigma); never beyond the ends, where the choice of the first step may look."""
        low, high = sorted((in_flow(self.start), in_flow(self.end)), key=lambda point: point.u)
        if p <= low.u:
            return low
        return high if p >= high.u else in_flow(level_of_log_snr(self.schedule, 2 * log((1 - p) / p)))


def check_tolerances(rtol: float, atol: float) -> None:
    least = _rounding(torch.float64)
    if not (least <= rtol <= 1 and least <= atol <= 1):
        raise ValueError(
            f"rtol and atol must lie between the rounding of float64, {least:.1e} (that of a float32 network is "
            f"{_rounding(torch.float32):.1e}), and 1, not {rtol} and {atol}"
        )


def check_reachable(rtol: float, atol: float, precision: torch.dtype) -> None:
    """UserError for tolerances below the rounding of estimates."""
    if rtol + atol < _rounding(precision):
        raise UserError(
            f"rtol={rtol} and atol={atol} of dopri5 cannot be met in {precision}, whose rounding is "
            f"{_rounding(precision):.1e}: make one larger, or use a finer precision (precision=fp32 for a network)"
        )


def integrated(
    slope: Callable[[Point, Any], Any],
    z: Any,
    flow: Flow,
    rtol: float,
    atol: float,
    dtype: torch.dtype,
    device: torch.device,
    **options: Any,
) -> Any:
    """Dormand and Prince's method on dz/dp = slope(point, z) from the start of the flow to its end.

    z: a tensor or a tuple of them, of which the slope asks the network once, in `dtype`. options: of torchdiffeq's
    dopri5. UserError where it cannot go on.
    """
    limits, calls = f"rtol={rtol} and atol={atol}", 0
    check_reachable(rtol, atol, dtype)
    where = f"on {type(flow.schedule).__name__} between t = {flow.start.t:g} and {flow.end.t:g}"

    def counted(p: Tensor, z: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > MAX_CALLS:
            raise UserError(
                f"dopri5 gave up after {MAX_CALLS:,} network calls {where}: {limits} are too small for this network "
                "in its precision, or x_0 is clipped; make them larger"
            )
        return slope(flow.at(p.item()), z)

    ends = torch.tensor([in_flow(flow.start).u, in_flow(flow.end).u], dtype=torch.float64, device=device)
    # step_t: the last step stops at the end instead of passing it, where there may be no level.
    options = {"step_t": ends[1:], **options}
    try:
        path = odeint(counted, z, ends, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:  # how odeint says that it cannot go on
        raise UserError(
            f"dopri5 gave up after {calls:,} network calls {where} ({error}): the network returns inf or NaN, or "
            f"{limits} are too small for {dtype}"
        ) from error
    return path[-1] if isinstance(path, Tensor) else tuple(values[-1] for values in path)


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@dataclass(frozen=True)
class DormandPrince(Solver):
    """dopri5 with an error of each of its steps below atol + rtol |z|, for z = x / (alpha + sigma) of every sample.

    Dormand and Prince 1980, as Song et al. 2021b, appendix D.4, use it; in the coordinate of `runge_kutta`. One step of
    the grid is one integration, so a grid of t_max and t_min leaves all the choice to the method. Other solvers never
    wait for the device: this one reads an error norm after each of its steps, and p at each call. Its steps are as
    small as the hardest sample of the batch needs: sample i is a function of (seed, i) only to within the tolerance.

    UserError for a tolerance below the rounding of x or of the network, after MAX_CALLS network calls, and for
    estimates that are not finite.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    order: ClassVar[int] = 5

    def __post_init__(self):
        check_tolerances(self.rtol, self.atol)

    def check(self, precision):
        check_reachable(self.rtol, self.atol, precision)

    def plan(self, schedule, times, variance):
        schedule = schedule.frozen()  # it is asked at each call
        return [Flow(schedule, t, s) for t, s in pairwise(levels(schedule, times))]

    def step(self, denoise, x, plan, state, noise):
        def slope(point: Point, z: Tensor) -> Tensor:
            return (z - denoise(point.scale * z, point.level).x_0_hat) / point.u

        z = x / in_flow(plan.start).scale
        z = integrated(slope, z, plan, self.rtol, self.atol, x.dtype, x.device, norm=_largest_rms)
        return in_flow(plan.end).scale * z, state


def _largest_rms(error: Tensor) -> Tensor:
    """(B, ...) -> (), of the worst sample: the mean over a batch would let some of its samples pass the tolerance."""
    return error.flatten(1).square().mean(1).max().sqrt()
