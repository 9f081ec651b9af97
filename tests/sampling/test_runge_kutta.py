"""Runge-Kutta in p = sigma / (alpha + sigma): against the formulas, and to order.

Only on a mixture is the order of every method the one of the book: on a Gaussian the midpoint method gains one.
"""

from types import SimpleNamespace

import pytest
import torch
from cases import each
from exact import MIXTURE, ExactDenoiser
from options import built
from solving import Noise, slope
from torch.testing import assert_close

from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.adaptive import DormandPrince
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.runge_kutta import Heun, LinearStep, Midpoint, Tableau, in_flow

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
every_schedule = each("schedule", SCHEDULES)
# In p all schedules have one ODE (that their steps are its steps is tested on every one): a few tell its order.
few_schedules = each("schedule", {name: SCHEDULES[name] for name in ("linear", "rectified_flow", "zero_terminal_snr")})
every_method = each("solver", {"heun": Heun(), "midpoint": Midpoint()})
EXACT = ExactDenoiser(MIXTURE)


def times_in_p(schedule, num_steps):
    """(num_steps + 1,), equal steps of p = sigma / (alpha + sigma) over the range, alpha = 0 included."""
    low, high = schedule.t_range
    start, end = (in_flow(level).u for level in levels(schedule, [high, low]))
    p = torch.linspace(start, end, num_steps + 1, dtype=torch.float64)
    times = schedule.t_of_log_snr(2 * ((1 - p) / p).log())
    return torch.cat([times.new_tensor([high]), times[1:-1], times.new_tensor([low])])


def path_end(solver, schedule, times, x, data=MIXTURE):
    exact, state = ExactDenoiser(data), solver.init()
    for plan in solver.plan(schedule, times, FixedSmall()):
        x, state = solver.step(lambda x, level: exact(x, level, None), x, plan, state, None)
    return x


def x_at(schedule, t, n=20, data=MIXTURE):
    (level,) = levels(schedule, [t])
    return data.sample_t(n, level.alpha, level.sigma, torch.Generator().manual_seed(0))


def velocity(schedule, p, z):
    """eps_hat - x_0_hat of z = (1 - p) x_0 + p eps, at a p > 0 given as a number."""
    x_0_hat = MIXTURE.denoise(
        z, *torch.tensor([1 - p, p], dtype=torch.float64)
    )  # of the same data seen at another scale
    eps_hat = (z - (1 - p) * x_0_hat) / p
    return eps_hat - x_0_hat


@every_schedule
@every_method
def test_one_step_is_the_formula(solver, schedule):
    low, high = schedule.t_range
    for t, s in ((high, 0.6), (0.7, 0.6), (0.4, low), (low, 0.5), (0.5, high)):  # alpha 0, and encoding, included
        at = levels(schedule, [t, s])
        (a, b), x = (in_flow(level) for level in at), x_at(schedule, t)
        h, z = b.u - a.u, x / a.scale
        k = velocity(schedule, a.u, z)
        if solver == Heun():
            z = z + h / 2 * (k + velocity(schedule, b.u, z + h * k))
        else:
            z = z + h * velocity(schedule, a.u + h / 2, z + h / 2 * k)
        times = torch.tensor([t, s], dtype=torch.float64)
        assert_close(path_end(solver, schedule, times, x), b.scale * z, rtol=1e-6, atol=1e-8)


@every_schedule
def test_eulers_method_in_p_is_ddim(schedule):
    euler = SimpleNamespace(a=((),), b=(1.0,), c=(0.0,))  # of order 1: no Tableau of ours
    for t in (schedule.t_range[1], 0.7):
        times = torch.tensor([t, 0.6], dtype=torch.float64)
        a, b = (in_flow(level) for level in levels(schedule, times))
        x = x_at(schedule, t)
        step = LinearStep.of(euler, [a], b)(lambda x, level: EXACT(x, level, None), x)
        assert_close(step, path_end(DDIM(0.0), schedule, times, x), rtol=1e-9, atol=1e-12)


@few_schedules
@every_method
def test_order_on_a_mixture_is_the_declared_one(solver, schedule):
    steps = (32, 64, 128)
    x = x_at(schedule, schedule.t_range[1])
    truth = path_end(DormandPrince(1e-10, 1e-10), schedule, times_in_p(schedule, 1), x)
    ends = (path_end(solver, schedule, times_in_p(schedule, n), x) for n in steps)
    assert abs(slope(steps, [(end - truth).norm().item() for end in ends]) - solver.order) < 0.15


@few_schedules
@every_method
def test_encoding_is_undone_to_second_order(solver, schedule):
    x, errors = x_at(schedule, schedule.t_range[0]), []
    for num_steps in (40, 80):
        times = times_in_p(schedule, num_steps)
        x_T = path_end(solver, schedule, times.flip(0), x)
        errors.append((path_end(solver, schedule, times, x_T) - x).norm() / x.norm())
    assert errors[0] < 0.05
    assert errors[1] < 0.35 * errors[0]


@every_method
def test_two_calls_a_step_the_first_where_the_step_starts(solver):
    schedule, seen = SCHEDULES["linear"], []
    (plan,) = solver.plan(schedule, torch.tensor([0.7, 0.6], dtype=torch.float64), FixedSmall())
    solver.step(lambda x, level: Estimate(seen.append((x, level)) or 0 * x), Noise(3)(), plan, None, None)
    t, s = levels(schedule, [0.7, 0.6])
    assert torch.equal(seen[0][0], Noise(3)())
    assert (len(seen), seen[0][1]) == (2, t)
    assert seen[1][1] == s if solver == Heun() else s.t < seen[1][1].t < t.t


@pytest.mark.parametrize(
    ("a", "b", "c", "what"),
    [
        (((), (1.0,)), (0.5, 0.5), (0.0, 0.9), "row"),
        (((), (1.0,)), (0.5, 0.4), (0.0, 1.0), "sum to 1"),
        (((), (1.0,)), (0.4, 0.6), (0.0, 1.0), "1/2"),
        (((),), (1.0,), (0.0,), "1/2"),  # Euler's
        (((0.5,), (1.0,)), (0.5, 0.5), (0.5, 1.0), "triangular"),  # implicit
        (((),), (0.5, 0.5), (0.0, 1.0), "triangular"),
    ],
)
def test_tableau_refuses_what_is_not_of_second_order(a, b, c, what):
    with pytest.raises(ValueError, match=what):
        Tableau(a, b, c)
