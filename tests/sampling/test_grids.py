"""Grids are decreasing, begin and end where they should, and are spaced as they say."""

from itertools import pairwise

import pytest
import torch
from cases import each
from configured import SAMPLERS, SCHEDULES, every_schedule
from torch.testing import assert_close

from diffusion_trainer.process.beta_tables import LinearBeta
from diffusion_trainer.process.schedules import EDM, Cosine, RectifiedFlow
from diffusion_trainer.sampling.grids import (
    LEAST_LOG_SNR,
    Karras,
    Quadratic,
    SubSequence,
    Trailing,
    UniformLogSNR,
    UniformTime,
)

GRIDS = {str(s.grid): s.grid for s in SAMPLERS.values()} | {"uniform in sigma": Karras(rho=1.0)}
WITHOUT_SIGNAL = {"rectified_flow_to_1": RectifiedFlow(t_max=1.0), "zero_terminal_snr": SCHEDULES["zero_terminal_snr"]}


def equal(steps, rtol):
    assert_close(steps, steps.mean().expand_as(steps), rtol=rtol, atol=0)


@each("schedule", SCHEDULES | WITHOUT_SIGNAL)
@each("grid", GRIDS)
def test_grids_decrease_from_the_noisy_end_to_0(grid, schedule):
    for num_steps in (1, 2, 5, 50, 200, 1001, 30_000):
        if isinstance(grid, Trailing) and num_steps > 200:
            continue  # a discrete process has not as many: see below
        times = grid(schedule, num_steps)
        assert (times.shape, times.dtype) == ((num_steps + 1,), torch.float64)
        assert (times[0].item(), times[-1].item()) == (schedule.t_range[1], 0)
        assert (times.diff() < 0).all()
        assert (schedule.sigma(times[:-1]) > 0).all()
        assert times[-2] >= schedule.t_range[0]  # nothing below it has been trained


@every_schedule
def test_uniform_time_has_equal_steps_until_it_would_pass_the_clean_end(schedule):
    equal(UniformTime()(schedule, 20).diff(), 1e-9)
    low, high = schedule.t_range
    most = int(high / low)
    assert UniformTime()(schedule, most)[-2].item() == pytest.approx(high / most, rel=1e-12)
    times = UniformTime()(schedule, 2 * most)[:-1]
    equal(times.diff(), 1e-9)
    assert times[-1].item() == low


def test_quadratic_is_that_of_ddim_until_it_would_pass_the_clean_end():
    i = torch.arange(20, -1, -1, dtype=torch.float64)
    assert_close(Quadratic()(LinearBeta(), 20), (i / 20) ** 2, rtol=1e-12, atol=0)
    times = Quadratic()(LinearBeta(), 500)[:-1]
    equal(times.sqrt().diff(), 1e-9)
    assert_close(times[-1].item(), LinearBeta().t_range[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("rho", [1e-4, 0.1, 1.0, 1e6])
def test_no_rho_is_too_small_or_too_large(rho):
    times = Karras(rho)(EDM(), 20)
    assert (times.diff() < 0).all()
    assert times[[0, -2]].tolist() == pytest.approx(EDM().t_range[::-1], rel=1e-9)


def test_karras_gives_the_sigmas_of_the_paper():
    # Eq. 5, with its N, sigma_min and sigma_max.
    i, n = torch.arange(18, dtype=torch.float64), 18
    sigma = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert_close(EDM().sigma(Karras()(EDM(), n)[:-1]), sigma, rtol=1e-9, atol=0)


@each("schedule", SCHEDULES | WITHOUT_SIGNAL)
@each("grid", {"log_snr": UniformLogSNR(), "karras": Karras(rho=7.0)})
def test_equal_steps_down_to_the_clean_end_from_the_noisy_one_or_from_a_little_signal(grid, schedule):
    times = grid(schedule, 20)[:-1]
    log_snr = schedule.log_snr(times)
    assert log_snr[1] > LEAST_LOG_SNR
    log_snr[0] = max(log_snr[0].item(), LEAST_LOG_SNR)
    # (sigma / alpha)^(1 / 7)
    equal(log_snr.diff() if grid == UniformLogSNR() else (-log_snr / 14).exp().diff(), 1e-6)
    assert_close(times[-1].item(), schedule.t_range[0], rtol=1e-9, atol=0)


def test_trailing_steps_are_those_of_the_paper():
    # Table 2 of Lin et al. 2024, T = 1000 and N = 10; and a stride that is not whole.
    steps = Trailing(1000)(LinearBeta(), 10)[:-1] * 1000
    assert steps.round(decimals=9).tolist() == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]
    assert (Trailing(10)(LinearBeta(), 3) * 10).round(decimals=9).tolist() == [10, 7, 3, 0]
    assert_close(Trailing(1000)(LinearBeta(), 1000), UniformTime()(LinearBeta(), 1000), rtol=0, atol=1e-12)


def spread(schedule, num_timesteps, num_steps):
    """Whether the trailing steps, found one by one, lie apart and in the range of the schedule."""
    low, high = schedule.t_range
    steps = [round(num_timesteps - i * num_timesteps / num_steps) for i in range(num_steps)]
    times = [high if k == num_timesteps else k / num_timesteps for k in steps]
    return low <= times[-1] and all(a > b for a, b in pairwise(times))


@pytest.mark.parametrize("num_timesteps", [2, 7, 60, 1000])
@each("schedule", {str(s): s for s in (Cosine(), Cosine(t_min=0.2), RectifiedFlow(t_min=0.3, t_max=0.6), LinearBeta())})
def test_trailing_refuses_what_leaves_the_range_and_names_the_largest_number_that_does_not(schedule, num_timesteps):
    grid = Trailing(num_timesteps)
    most = max(n for n in range(1, num_timesteps + 1) if spread(schedule, num_timesteps, n))
    assert grid(schedule, most)[-2] >= schedule.t_range[0]
    for num_steps in (most + 1, 2 * most + 3, num_timesteps + 1):
        with pytest.raises(ValueError, match=f"num_steps={num_steps} .* take at most {most}$"):
            grid(schedule, num_steps)


@pytest.mark.parametrize("steps", [(1, 40, 1000), (1000, 40, 1), (40, 1000, 1)])
def test_sub_sequence_is_that_given_in_either_order(steps):
    assert SubSequence(steps)(LinearBeta(), 3).tolist() == [1.0, 0.04, 0.001, 0]
    assert SubSequence(steps)(Cosine(), 3).tolist() == [0.999, 0.04, 0.001, 0]  # step T is the noisy end


def test_sub_sequence_without_the_noisiest_step_starts_below_the_noisy_end():
    assert SubSequence([1, 981])(LinearBeta(), 2).tolist() == [0.981, 0.001, 0]


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("num_steps=3", lambda: SubSequence([1, 2])(LinearBeta(), 3)),
        ("1..num_timesteps=1000", lambda: SubSequence([0, 2])),
        ("1..num_timesteps=1000", lambda: SubSequence([2, 1001])),
        ("differ", lambda: SubSequence([2, 3, 2])),
        ("t_max=0.999", lambda: SubSequence([999, 1000])(Cosine(), 2)),
        ("t_max=0.999", lambda: SubSequence([9999], num_timesteps=10_000)(Cosine(), 1)),
        ("t_max=0.999", lambda: Trailing(1000)(Cosine(), 1000)),
        ("t_min=0.2", lambda: SubSequence([199, 500, 1000])(Cosine(t_min=0.2), 3)),
        ("take at most 10", lambda: Trailing(10)(LinearBeta(), 11)),
        ("rho", lambda: Karras(rho=0.0)),
    ],
)
def test_what_no_grid_can_be_is_refused(message, wrong):
    with pytest.raises(ValueError, match=message):
        wrong()
