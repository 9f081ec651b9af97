"""DPM-Solver++: the paper's formulas written out, and what its steps are exact for."""

from itertools import pairwise
from math import exp, expm1, inf

import pytest
import torch
from cases import each
from configured import SCHEDULES, every_schedule
from exact import MIXTURE
from solving import Noise, drawn, unbounded
from torch.testing import assert_close

from diffusion_trainer.process.levels import level_of_log_snr, levels
from diffusion_trainer.process.schedules import RectifiedFlow
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.dpm_solver import DPMSolverPP2M, DPMSolverPP2S, DPMSolverPP3M, DPMSolverPPSDE2M
from diffusion_trainer.sampling.grids import UniformLogSNR
from diffusion_trainer.sampling.sampler import Sampler

TIMES = (0.8, 0.6, 0.45, 0.3)


def path(solver, schedule, x, estimate, times=TIMES, noise=None):
    """x at each of the times, from x at the first; estimate(x, level) -> x_0_hat."""
    plan = solver.plan(schedule, torch.tensor(times, dtype=torch.float64), FixedSmall())
    xs, state = [x], solver.init()
    for planned in plan:
        x, state = solver.step(lambda x, level: Estimate(estimate(x, level)), x, planned, state, noise)
        xs.append(x)
    return xs


class Recorded:
    """Estimates drawn at random, one for each call, and where they were asked for."""

    def __init__(self):
        self.noise, self.levels, self.estimates = Noise(4, seed=5), [], []

    def __call__(self, x, level):
        self.levels.append(level)
        self.estimates.append(self.noise())
        return self.estimates[-1]


def parts(schedule, times=TIMES):
    """Levels and the step sizes h, the last step's first."""
    at = levels(schedule, times)
    return at, [s.half_log_snr - t.half_log_snr for t, s in pairwise(at)][::-1]


@every_schedule
def test_2m_is_algorithm_2(schedule):
    seen, x = Recorded(), Noise(4)()
    xs = path(DPMSolverPP2M(), schedule, x, seen)
    at, (h, h_last, _) = parts(schedule)
    _, before, newest = seen.estimates
    r = h_last / h
    d = (1 + 1 / (2 * r)) * newest - 1 / (2 * r) * before
    expected = at[3].sigma / at[2].sigma * xs[2] - at[3].alpha * expm1(-h) * d
    assert_close(xs[3], expected, rtol=1e-9, atol=1e-9)
    assert seen.levels == at[:3]


@every_schedule
def test_3m_is_the_formula_of_finite_differences(schedule):
    seen, x = Recorded(), Noise(4)()
    xs = path(DPMSolverPP3M(), schedule, x, seen)
    at, (h, h_0, h_1) = parts(schedule)
    oldest, before, newest = seen.estimates
    r_0, r_1 = h_0 / h, h_1 / h
    d_1_0, d_1_1 = (newest - before) / r_0, (before - oldest) / r_1
    d_1, d_2 = d_1_0 + r_0 / (r_0 + r_1) * (d_1_0 - d_1_1), (d_1_0 - d_1_1) / (r_0 + r_1)
    phi_1 = expm1(-h)
    phi_2 = phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    # d_2 stands for h^2 D'' / 2, and phi_3 goes with h^2 D''.
    expected = at[3].sigma / at[2].sigma * xs[2] + at[3].alpha * (-phi_1 * newest + phi_2 * d_1 - phi_3 * 2 * d_2)
    assert_close(xs[3], expected, rtol=1e-9, atol=1e-9)
    assert_close(xs[2], path(DPMSolverPP2M(), schedule, x, Recorded())[2], rtol=1e-12, atol=1e-12)  # it starts with 2M


@every_schedule
def test_2s_is_algorithm_1_with_the_middle_in_log_snr(schedule):
    seen, x = Recorded(), Noise(4)()
    _, x_s = path(DPMSolverPP2S(), schedule, x, seen, times=TIMES[:2])
    t, s = levels(schedule, TIMES[:2])
    middle, h = level_of_log_snr(schedule, t.half_log_snr + s.half_log_snr), s.half_log_snr - t.half_log_snr
    assert seen.levels[0] == t
    assert_close(seen.levels[1].half_log_snr, t.half_log_snr + h / 2, rtol=1e-9, atol=1e-9)
    expected = s.sigma / t.sigma * x - s.alpha * expm1(-h) * seen.estimates[1]
    assert_close(x_s, expected, rtol=1e-9, atol=1e-9)

    arrived = []
    path(DPMSolverPP2S(), schedule, x, lambda x, level: arrived.append(x) or 0.3 * x, times=TIMES[:2])
    u = middle.sigma / t.sigma * x - middle.alpha * expm1(-h / 2) * (0.3 * x)
    assert_close(arrived[1], u, rtol=1e-9, atol=1e-9)


@every_schedule
def test_sde_2m_is_the_formula_of_the_paper(schedule):
    seen, x = Recorded(), Noise(4)()
    xs = path(DPMSolverPPSDE2M(), schedule, x, seen, noise=Noise(4, seed=9))
    at, (h, h_last, _) = parts(schedule)
    _, before, newest = seen.estimates
    noise = Noise(4, seed=9)
    z = [noise() for _ in range(3)][-1]
    d = newest + (newest - before) / (2 * h_last / h)
    t, s = at[2:]
    expected = s.sigma / t.sigma * exp(-h) * xs[2] - s.alpha * expm1(-2 * h) * d + s.sigma * (-expm1(-2 * h)) ** 0.5 * z
    assert_close(xs[3], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "steps_before", "degree"), [(DPMSolverPP2M(), 0, 0), (DPMSolverPP3M(), 2, 2)], ids=str
)
def test_steps_are_exact_for_polynomials_in_half_log_snr(solver, steps_before, degree):
    schedule, ends = SCHEDULES["cosine"], TIMES[: steps_before + 2]
    t, s = levels(schedule, ends[-2:])

    def estimate(x, level):
        return torch.full_like(x, 0.7 + (level.half_log_snr + 0.2) ** degree)

    xs = path(solver, schedule, Noise(1)(), estimate, times=ends)
    # x_s = (sigma_s / sigma_t) x_t + sigma_s int e^half_log_snr x_0_hat (Lu et al. 2022b, eq. 8), by Gauss-Legendre.
    a, b = t.half_log_snr, s.half_log_snr
    points, pieces = [(-(0.6**0.5), 5 / 9), (0.0, 8 / 9), (0.6**0.5, 5 / 9)], 64
    total = 0.0
    for i in range(pieces):  # a composite rule of order 6
        low, width = a + (b - a) * i / pieces, (b - a) / pieces
        for node, weight in points:
            where = low + width * (1 + node) / 2
            total += width / 2 * weight * exp(where) * (0.7 + (where + 0.2) ** degree)
    assert_close(xs[-1], s.sigma / t.sigma * xs[-2] + s.sigma * total, rtol=1e-11, atol=1e-11)


@each("solver", {"2m": DPMSolverPP2M(), "3m": DPMSolverPP3M(), "2s": DPMSolverPP2S()})
def test_from_no_signal_the_first_step_is_ddims_and_the_next_do_not_look_back_to_it(solver):
    schedule, times, x = RectifiedFlow(t_max=1.0), (1.0, 0.7, 0.5, 0.4), Noise(4)()
    assert levels(schedule, times)[0].half_log_snr == -inf
    xs = path(solver, schedule, x, lambda x, level: 0.3 * x, times=times)
    ddim = path(DDIM(), schedule, x, lambda x, level: 0.3 * x, times=times[:2])
    assert_close(xs[1], ddim[1], rtol=1e-12, atol=1e-12)
    alone = path(solver, schedule, xs[1], lambda x, level: 0.3 * x, times=times[1:])
    assert_close(torch.stack(xs[2:]), torch.stack(alone[1:]), rtol=1e-12, atol=1e-12)


@each("solver", {"2m": DPMSolverPP2M(), "3m": DPMSolverPP3M(), "2s": DPMSolverPP2S()})
def test_to_no_signal_the_last_step_of_an_encoding_is_ddims(solver):
    schedule, times = RectifiedFlow(t_max=1.0), (0.4, 0.5, 0.7, 1.0)
    xs = path(solver, schedule, Noise(4)(), lambda x, level: 0.3 * x, times=times)
    ddim = path(DDIM(), schedule, xs[2], lambda x, level: 0.3 * x, times=times[2:])
    assert_close(xs[3], ddim[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "calls"), [(DPMSolverPP2M(), 10), (DPMSolverPP3M(), 10), (DPMSolverPP2S(), 19)], ids=str
)
def test_calls_of_the_network(solver, calls):
    seen = Recorded()
    sampler = unbounded(Sampler(solver, UniformLogSNR(), 10), 10)
    times = sampler.grid(SCHEDULES["linear"], 10)[:-1].tolist()
    path(solver, SCHEDULES["linear"], Noise(4)(), seen, times=times)
    assert len(seen.levels) + 1 == calls  # and the sampler's last


def test_sde_2m_draws_once_a_step():
    assert drawn(Sampler(DPMSolverPPSDE2M(), UniformLogSNR(), 9, None), MIXTURE, SCHEDULES["linear"], 3)[1] == 8
