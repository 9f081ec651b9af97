"""Variances of the reverse step against the discrete process, Gaussian conditioning and the known optimum."""

import pytest
import torch
from options import built, each
from oracle import Mixture, forward_posterior
from torch.testing import assert_close

from diffusion_trainer.process.schedules import LinearBeta
from diffusion_trainer.process.variances import FixedLarge, FixedSmall, transition_variance

every_schedule = each("schedule", built("schedule"))
T = 1000


def pairs(schedule, count=40):
    """Random s < t, (count,) each, and (alpha_t, sigma_t, alpha_s, sigma_s)."""
    low, high = schedule.t_range
    u = torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(1).values
    s, t = (low + (high - low) * u).unbind(1)
    return t, s, (schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s))


@every_schedule
def test_between_neighbours_they_are_beta_and_beta_tilde_of_the_discrete_process(schedule):
    t = torch.arange(1, T, dtype=torch.float64) / T  # k = T is left out: the cosine schedule ends before it
    s = (t - 1 / T).clamp(min=0)
    alpha_bar, before = schedule.alpha(t) ** 2, schedule.alpha(s) ** 2
    beta = 1 - alpha_bar / before
    beta_tilde = (1 - before) / (1 - alpha_bar) * beta  # Ho et al. 2020, eq. 7
    assert_close(FixedLarge()(schedule, t, s), beta, rtol=1e-7, atol=1e-12)
    assert_close(FixedSmall()(schedule, t, s), beta_tilde, rtol=1e-7, atol=1e-12)


def test_large_variance_of_linear_beta_is_linear_in_the_step():
    k = torch.arange(1, T + 1, dtype=torch.float64)
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    assert_close(FixedLarge()(LinearBeta(), k / T, (k - 1) / T), betas, rtol=1e-7, atol=0)


@every_schedule
def test_small_variance_is_that_of_the_forward_posterior(schedule):
    t, s, levels = pairs(schedule)
    x = torch.zeros(len(t), 1, dtype=torch.float64)
    assert_close(FixedSmall()(schedule, t, s), forward_posterior(x, x, *levels)[1][:, 0], rtol=1e-7, atol=1e-12)


@every_schedule
def test_small_variance_is_optimal_for_a_point_and_large_for_a_standard_normal(schedule):
    t, s, (alpha_t, sigma_t, alpha_s, sigma_s) = pairs(schedule)
    for variance, spread in ((FixedSmall(), 0.0), (FixedLarge(), 1.0)):
        data = Mixture.gaussian([0.3], [[spread]])
        optimal = [data.optimal_variance(*level) for level in zip(alpha_s, sigma_s, alpha_t, sigma_t, strict=True)]
        assert_close(variance(schedule, t, s), torch.stack(optimal), rtol=1e-7, atol=1e-10)


@every_schedule
def test_transitions_compose(schedule):
    t, s, (alpha_t, _, alpha_s, _) = pairs(schedule)
    r = s / 2
    through_s = transition_variance(schedule, t, s) + (alpha_t / alpha_s) ** 2 * transition_variance(schedule, s, r)
    assert_close(transition_variance(schedule, t, r), through_s, rtol=1e-9, atol=1e-12)


@every_schedule
def test_step_to_the_data_has_no_small_variance_and_all_of_the_large(schedule):
    t = torch.linspace(*schedule.t_range, 20, dtype=torch.float64)
    assert (FixedSmall()(schedule, t, torch.zeros_like(t)) == 0).all()
    assert_close(FixedLarge()(schedule, t, torch.zeros_like(t)), schedule.sigma(t) ** 2, rtol=1e-12, atol=0)


@every_schedule
@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()], ids=str)
def test_float32_keeps_three_digits_between_neighbours(schedule, variance):
    t = torch.linspace(schedule.t_range[0] + 1 / T, schedule.t_range[1], 2001)
    exact = variance(schedule, t.double(), (t - 1 / T).double())
    assert_close(variance(schedule, t, t - 1 / T).double(), exact, rtol=1e-3, atol=0)
