"""Dormand and Prince's adaptive method: exact to its tolerance, in as many calls as that takes, up to a limit."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from exact import GAUSSIAN
from solving import Noise
from test_runge_kutta import EXACT, SCHEDULES, every_schedule, path_end, times_in_p, x_at
from torch.testing import assert_close

from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.adaptive import MAX_CALLS, DormandPrince
from diffusion_trainer.sampling.runge_kutta import in_flow


@pytest.mark.slow
@every_schedule
def test_dormand_prince_meets_the_exact_flow_to_its_tolerance_in_both_directions(schedule):
    ends = times_in_p(schedule, 1)
    for times in (ends, ends.flip(0)):
        start, end = levels(schedule, times)
        x = x_at(schedule, times[0].item(), data=GAUSSIAN)
        numbers = (torch.tensor(v, dtype=torch.float64) for v in (start.alpha, start.sigma, end.alpha, end.sigma))
        truth = GAUSSIAN.probability_flow(x, *numbers)
        for tolerance in (1e-5, 1e-8):
            x_s = path_end(DormandPrince(tolerance, tolerance), schedule, times, x, GAUSSIAN)
            # In units of z; encoding magnifies: the flow pulls neighbours apart by sqrt(1 / smallest variance).
            assert (x_s - truth).abs().max() / in_flow(end).scale < 30 * tolerance


def test_dormand_prince_stays_between_its_ends_and_takes_few_calls():
    for schedule in SCHEDULES.values():
        for times in (times_in_p(schedule, 1), times_in_p(schedule, 1).flip(0)):
            (plan,), seen = DormandPrince().plan(schedule, times, FixedSmall()), []

            def denoise(x, level, seen=seen):
                seen.append(level.t)
                return EXACT(x, level, None)

            DormandPrince().step(denoise, x_at(schedule, times[0].item()), plan, None, None)
            assert min(times) - 1e-9 <= min(seen) <= max(seen) <= max(times) + 1e-9
            assert seen[0] == times[0]
            assert 20 < len(seen) < 400


def test_dormand_prince_takes_the_steps_of_its_hardest_sample():
    # One that moves among a thousand that stay at 0 must not be lost in a mean.
    times, x = times_in_p(SCHEDULES["vp_sde"], 1), x_at(SCHEDULES["vp_sde"], 1.0, 1)
    (plan,) = DormandPrince().plan(SCHEDULES["vp_sde"], times, FixedSmall())

    def denoise(x, level):
        return Estimate(torch.cat([EXACT(x[:1], level, None).x_0_hat, 0 * x[1:]]))

    alone, among = (
        DormandPrince().step(denoise, torch.cat([x, x.new_zeros(n, 2)]), plan, None, None)[0][0] for n in (0, 1000)
    )
    assert_close(among, alone, rtol=0, atol=1e-12)


def test_dormand_prince_keeps_float32():
    for schedule in SCHEDULES.values():
        times, x = times_in_p(schedule, 1), x_at(schedule, schedule.t_range[1])
        single = path_end(DormandPrince(), schedule, times, x.float())
        assert single.dtype == torch.float32
        assert_close(single.double(), path_end(DormandPrince(), schedule, times, x), rtol=0, atol=1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dormand_prince_says_that_the_network_is_broken(bad):
    schedule = SCHEDULES["linear"]
    (plan,) = DormandPrince().plan(schedule, times_in_p(schedule, 1), FixedSmall())
    with pytest.raises(UserError, match=r"on LinearBeta between .*NaN"):
        DormandPrince().step(lambda x, level: Estimate(torch.full_like(x, bad)), Noise(3)(), plan, None, None)


def noisy(calls):
    """Of no smooth network: the error of a step falls no faster than its length."""
    generator = torch.Generator().manual_seed(0)

    def denoise(x, level):
        calls.append(level)
        return Estimate(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype))

    return denoise


def test_dormand_prince_ends_after_a_number_of_calls_and_names_it(monkeypatch):
    monkeypatch.setattr("diffusion_trainer.sampling.adaptive.MAX_CALLS", 500)
    (plan,), calls = DormandPrince(1e-7, 1e-6).plan(SCHEDULES["linear"], [0.9, 0.1], FixedSmall()), []
    with pytest.raises(
        UserError, match=r"500 network calls on LinearBeta between t = 0\.9 and 0\.1: rtol=1e-07 and atol=1e-06"
    ):
        DormandPrince(1e-7, 1e-6).step(noisy(calls), Noise(3)(), plan, None, None)
    assert len(calls) == 500


def test_what_float64_can_reach_takes_a_third_of_the_calls_allowed():
    calls, schedule, least = [], SCHEDULES["linear"], 1e-15
    (plan,) = DormandPrince(least, least).plan(schedule, times_in_p(schedule, 1), FixedSmall())

    def denoise(x, level):
        calls.append(level)
        return EXACT(x, level, None)

    DormandPrince(least, least).step(denoise, x_at(schedule, 1.0, 1), plan, None, None)
    assert 1000 < len(calls) < MAX_CALLS / 3


@pytest.mark.parametrize(("dtype", "refused"), [(torch.float32, True), (torch.float64, False)], ids=str)
def test_a_tolerance_below_the_rounding_of_x_is_refused_before_any_call(dtype, refused):
    calls, solver = [], DormandPrince(1e-8, 1e-9)
    (plan,) = solver.plan(SCHEDULES["linear"], [0.9, 0.1], FixedSmall())

    def denoise(x, level):
        calls.append(level)
        return Estimate(x / 2)

    if refused:
        with pytest.raises(UserError, match=r"rtol=1e-08 and atol=1e-09 of dopri5 cannot be met in torch\.float32"):
            solver.step(denoise, Noise(3)().to(dtype), plan, None, None)
    else:
        solver.step(denoise, Noise(3)().to(dtype), plan, None, None)
    assert (len(calls) == 0) == refused


@pytest.mark.parametrize("field", ["rtol", "atol"])
@pytest.mark.parametrize("wrong", [0.0, -1.0, nan, inf, 1.5, 1e-16, 1e-30])
def test_dormand_prince_refuses_what_is_no_tolerance(field, wrong):
    with pytest.raises(ValueError, match=r"between the rounding of float64, 2\.2e-16"):
        replace(DormandPrince(), **{field: wrong})
