"""The sampler of Karras et al. 2022: algorithm 2 as written there, and its limits."""

from itertools import pairwise
from math import sqrt

import pytest
import torch
from cases import each
from exact import GAUSSIAN, MIXTURE, ExactDenoiser
from options import built
from oracle import Mixture
from solving import Noise, drawn, slope
from torch.testing import assert_close

from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.variances import FixedSmall
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.edm import EDMHeun
from diffusion_trainer.sampling.grids import Karras, UniformLogSNR, UniformTime
from diffusion_trainer.sampling.sampler import Sampler

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
WITH_SIGNAL = {name: s for name, s in SCHEDULES.items() if s.at_noisy_end.alpha}
every_schedule = each("schedule", WITH_SIGNAL)
TIMES = torch.tensor([0.7, 0.6, 0.5], dtype=torch.float64)


def path_end(solver, schedule, times, x, noise=None, data=MIXTURE):
    exact = ExactDenoiser(data)
    for plan in solver.plan(schedule, times, FixedSmall()):
        x, _ = solver.step(lambda x, level: exact(x, level, None), x, plan, None, noise)
    return x


def algorithm_2(y, sigmas, noise, churn, s_min, s_max, s_noise):
    """Karras et al. 2022, algorithm 2, on y = x / alpha, without its last step (to sigma = 0)."""
    one, gamma_max = torch.ones((), dtype=torch.float64), sqrt(2) - 1
    for sigma, following in pairwise(sigmas):
        gamma = min(churn / len(sigmas), gamma_max) if s_min <= sigma <= s_max else 0
        hat = sigma + gamma * sigma
        if gamma:
            y = y + (hat**2 - sigma**2).sqrt() * s_noise * noise()
        d = (y - MIXTURE.denoise(y, one, hat)) / hat
        guess = y + (following - hat) * d
        y = y + (following - hat) * (d / 2 + (guess - MIXTURE.denoise(guess, one, following)) / following / 2)
    return y


@every_schedule
@pytest.mark.parametrize("churn", [0.0, 0.3, 100.0])
def test_steps_are_those_of_algorithm_2(schedule, churn):
    at = levels(schedule, TIMES)
    sigmas = torch.tensor([level.sigma / level.alpha for level in at], dtype=torch.float64)
    x, s_max, s_noise = at[0].sigma * Noise(5)(), sigmas[0].item(), 1.007
    for s_min in (0.0, sigmas[0].item()):  # both steps raise sigma, or only the first
        solver = EDMHeun(churn, s_min, s_max, s_noise)
        y = algorithm_2(x / at[0].alpha, sigmas, Noise(5, 1), churn, s_min, s_max, s_noise)
        assert_close(path_end(solver, schedule, TIMES, x, Noise(5, 1)) / at[-1].alpha, y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "calls"),
    [
        (EDMHeun(0.0), 0),
        (EDMHeun(10.0), 8),  # nine steps before the jump; the first starts at sigma(t_max), where none is above
        (EDMHeun(10.0, s_min=1e9), 0),
        (EDMHeun(10.0, s_max=0.0), 0),
        (EDMHeun(10.0, s_min=1.0, s_max=8.0), 4),
    ],
)
def test_noise_is_drawn_where_sigma_is_raised_and_only_there(solver, calls):
    class Halving(UniformTime):  # sigma = 16, 8, ..., 2^-5
        def __call__(self, schedule, num_steps):
            sigmas = 16 * 0.5 ** torch.arange(num_steps, dtype=torch.float64)
            times = schedule.t_of_log_snr(-2 * sigmas.log())
            return torch.cat([times, torch.zeros(1, dtype=torch.float64)])

    schedule = type(SCHEDULES["edm"])(sigma_min=0.002, sigma_max=16.0)
    assert drawn(Sampler(solver, Halving(), 10, None), MIXTURE, schedule, 3)[1] == calls
    assert solver.deterministic == (solver.churn == 0)


@every_schedule
def test_no_level_is_above_the_noisy_end(schedule):
    top, seen = schedule.at_noisy_end, []
    first = schedule.t_of_log_snr(torch.tensor([top.log_snr, top.log_snr + 0.2], dtype=torch.float64))
    times = torch.cat([first, TIMES[first[1] > TIMES]])
    for plan in EDMHeun(100.0).plan(schedule, times, FixedSmall()):
        EDMHeun(100.0).step(
            lambda x, level: seen.append(level) or ExactDenoiser(GAUSSIAN)(x, level, None),
            Noise(3)(),
            plan,
            None,
            Noise(3),
        )
    assert min(level.log_snr for level in seen) >= top.log_snr - 1e-6
    assert sum(level.log_snr < top.log_snr + 1e-6 for level in seen) == 2  # the second step's was cut to it


@pytest.mark.slow
@every_schedule
def test_without_churn_it_is_of_second_order_both_ways(schedule):
    steps = (64, 128, 256)
    for flip in (False, True):
        errors = []
        for num_steps in steps:
            times = UniformLogSNR()(schedule, num_steps)[:-1]
            times = times.flip(0) if flip else times
            a, b = levels(schedule, times[[0, -1]])
            numbers = [torch.tensor(v, dtype=torch.float64) for v in (a.alpha, a.sigma, b.alpha, b.sigma)]
            x = GAUSSIAN.sample_t(20, *numbers[:2], torch.Generator().manual_seed(0))
            end = path_end(EDMHeun(), schedule, times, x, data=GAUSSIAN)
            errors.append((end - GAUSSIAN.probability_flow(x, *numbers)).norm().item())
        assert abs(slope(steps, errors) - 2) < 0.2


@pytest.mark.parametrize(("churn", "times"), [(0.0, [1.0, 0.7]), (10.0, [1.0, 0.7]), (0.0, [0.7, 1.0])])
def test_where_alpha_is_0_the_step_is_ddims(churn, times):
    schedule, times, x = SCHEDULES["zero_terminal_snr"], torch.tensor(times, dtype=torch.float64), Noise(5)()
    ours, ddims = (path_end(solver, schedule, times, x) for solver in (EDMHeun(churn), DDIM(0.0)))
    assert_close(ours, ddims, rtol=1e-9, atol=1e-12)


def test_a_step_over_most_of_sigma_is_ddims_and_with_churn_that_from_sigma_hat():
    schedule, x = SCHEDULES["edm"], 40.0 * Noise(5)()
    for first, ddims in ((13.0, True), (11.0, False)):
        times = torch.tensor([first / 80, 2.0 / 80], dtype=torch.float64)
        same = torch.allclose(*(path_end(solver, schedule, times, x) for solver in (EDMHeun(), DDIM(0.0))), rtol=1e-9)
        assert same == ddims
    times, z = torch.tensor([11.0 / 80, 2.0 / 80], dtype=torch.float64), Noise(5, 1)()
    (plan,) = EDMHeun(2.0).plan(schedule, times, FixedSmall())  # gamma sqrt(2) - 1: to 15.6
    x_s, _ = EDMHeun(2.0).step(lambda x, level: ExactDenoiser(MIXTURE)(x, level, None), x, plan, None, lambda: z)
    assert_close(x_s, path_end(DDIM(0.0), schedule, times * torch.tensor([2**0.5, 1]), x + 11.0 * z))


@each("schedule", SCHEDULES)
def test_in_few_steps_no_draw_is_farther_off_than_the_data_is_wide(schedule):
    variances, top = torch.linspace(0.05, 2, 8, dtype=torch.float64), schedule.at_noisy_end
    data = Mixture.gaussian([0.0] * 8, variances.diag().tolist())
    x_T = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = top.sigma * x_T * (variances / (top.alpha**2 * variances + top.sigma**2)).sqrt()
    for grid in (UniformTime(), UniformLogSNR(), Karras()):
        for num_steps in (4, 5, 6, 7):
            sampler = Sampler(EDMHeun(), grid, num_steps, None)
            drawn = sampler(ExactDenoiser(data), schedule, FixedSmall(), x_T, None, None)
            assert (drawn - truth).square().mean() < variances.mean()


@each("schedule", {name: SCHEDULES[name] for name in ("ve", "edm", "vp_sde")})
def test_mean_and_covariance_of_a_mixture_are_met_with_churn(schedule):
    n = 2_000
    x, calls = drawn(Sampler(EDMHeun(20.0), UniformLogSNR(), 64, None), MIXTURE, schedule, n)
    variances = MIXTURE.covariance().diagonal()
    assert calls == 62
    assert ((x.mean(0) - MIXTURE.mean()).abs() < 4 * (variances / n).sqrt()).all()
    assert ((torch.cov(x.T) - MIXTURE.covariance()).abs() < 4 * variances.max() * (2 / n) ** 0.5).all()


@pytest.mark.parametrize(
    "wrong",
    [{"churn": -1.0}, {"churn": float("nan")}, {"s_min": -1.0}, {"s_min": 2.0, "s_max": 1.0}, {"s_noise": 0.0}],
    ids=str,
)
def test_refuses_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EDMHeun(**wrong)
