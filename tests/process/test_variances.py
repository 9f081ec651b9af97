"""Variances of the reverse step against the discrete process, Gaussian conditioning and the known optimum."""

import pytest
import torch
from cases import each
from exact import GAUSSIAN
from options import built
from oracle import Mixture, forward_posterior
from torch.testing import assert_close

from diffusion_trainer.process.beta_tables import LinearBeta
from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.variances import Estimate, FixedLarge, FixedSmall, ReverseStep, transition_variance

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
every_schedule = each("schedule", SCHEDULES)
every_eta = each("eta", [0.0, 0.5, 1.0])
T = 1000
NOTHING = Estimate(torch.zeros(1, 1))


def pairs(schedule, count=40):
    """Levels at random s < t, (count,) float64; the last t is the noisy end."""
    low, high = schedule.t_range
    u = torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(1).values
    s, t = (low + (high - low) * u).unbind(1)
    t[-1] = high
    return schedule.level(t), schedule.level(s)


def neighbours(schedule):
    """Levels at t = k/T and s = (k-1)/T for all k of the range, from s = 0 on."""
    t = torch.arange(1, T + 1, dtype=torch.float64) / T
    t = t[t <= schedule.t_range[1]]
    return schedule.level(t), schedule.level((t - 1 / T).clamp(min=0))


def of_ddpm(variance, t, s):
    return ReverseStep.of(t, s).variance(variance.at(t, s)(NOTHING))


def row(level, i):
    return [value[i] for value in level[1:]]


@every_schedule
def test_between_neighbours_they_are_beta_and_beta_tilde_of_the_discrete_process(schedule):
    t, s = neighbours(schedule)
    beta = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
    beta_tilde = (s.sigma / t.sigma) ** 2 * beta  # Ho et al. 2020, eq. 7, whatever alpha^2 + sigma^2
    assert_close(of_ddpm(FixedLarge(), t, s), beta, rtol=1e-7, atol=1e-12)
    assert_close(of_ddpm(FixedSmall(), t, s), beta_tilde, rtol=1e-7, atol=1e-12)
    if schedule.variance_preserving:
        assert_close(beta, 1 - (t.alpha / s.alpha) ** 2, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "quadratic", "sigmoid", "constant", "cosine_beta"])
def test_large_variance_of_a_table_is_its_betas(name):
    t, s = neighbours(SCHEDULES[name])
    assert_close(of_ddpm(FixedLarge(), t, s), SCHEDULES[name].betas(), rtol=1e-7, atol=0)


def test_large_variance_of_linear_beta_is_linear_in_the_step():
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    assert_close(of_ddpm(FixedLarge(), *neighbours(LinearBeta())), betas, rtol=1e-7, atol=0)


@every_schedule
def test_large_variance_of_x_0_is_that_of_the_noise_where_the_variance_is_preserved(schedule):
    t, s = pairs(schedule)
    if schedule.variance_preserving:
        assert_close(FixedLarge().at(t, s)(NOTHING), t.sigma**2, rtol=1e-7, atol=0)


@every_schedule
def test_step_of_ddpm_is_the_forward_posterior(schedule):
    t, s = pairs(schedule)
    x_0, x_t = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = ReverseStep.of(t, s)
    mean, variance = forward_posterior(x_0, x_t, t.alpha, t.sigma, s.alpha, s.sigma)
    assert_close(step.of_x_t[:, None] * x_t + step.of_x_0[:, None] * x_0, mean, rtol=1e-7, atol=1e-10)
    assert_close(step.kept[:, None].expand_as(variance), variance, rtol=1e-7, atol=1e-12)


@every_schedule
@every_eta
def test_every_step_keeps_the_marginals(schedule, eta):
    t, s = pairs(schedule)
    step = ReverseStep.of(t, s, eta)
    assert_close(step.of_x_t * t.alpha + step.of_x_0, s.alpha, rtol=1e-9, atol=1e-12)
    assert_close((step.of_x_t * t.sigma) ** 2 + step.kept, s.sigma**2, rtol=1e-9, atol=1e-14)
    beta_tilde = (s.sigma / t.sigma) ** 2 * transition_variance(t, s)
    assert_close(step.kept, eta**2 * beta_tilde, rtol=1e-9, atol=1e-14)  # Song et al. 2021, eq. 16


@every_schedule
def test_step_of_ddim_moves_x_0_and_the_noise_along(schedule):
    t, s = pairs(schedule)
    step = ReverseStep.of(t, s, 0.0)
    x_0, eps = torch.randn(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_s = step.of_x_t * (t.alpha * x_0 + t.sigma * eps) + step.of_x_0 * x_0
    assert_close(x_s, s.alpha * x_0 + s.sigma * eps, rtol=1e-9, atol=1e-9)  # Song et al. 2021, eq. 12
    assert (step.kept == 0).all()


@every_schedule
@every_eta
def test_variance_of_the_step_is_the_optimal_one_given_that_of_x_0(schedule, eta):
    t, s = pairs(schedule)
    step = ReverseStep.of(t, s, eta)
    of_x_0 = GAUSSIAN.posterior_covariance(torch.zeros(40, 2), t.alpha, t.sigma).diagonal(dim1=-2, dim2=-1).mean(1)
    optimal = [
        GAUSSIAN.optimal_variance(*row(s, i), *row(t, i), lambda_squared=step.kept[i]) for i in range(len(t.alpha))
    ]  # Bao et al. 2022, theorem 1
    assert_close(step.variance(of_x_0), torch.stack(optimal), rtol=1e-7, atol=1e-10)


@every_schedule
def test_small_variance_is_optimal_for_a_point_and_large_for_a_standard_normal(schedule):
    t, s = pairs(schedule)
    for variance, spread in ((FixedSmall(), 0.0), (FixedLarge(), 1.0)):
        data = Mixture.gaussian([0.3], [[spread]])
        optimal = torch.stack([data.optimal_variance(*row(s, i), *row(t, i)) for i in range(len(t.alpha))])
        if spread == 0 or schedule.variance_preserving:  # N(0, I) is stationary only there
            assert_close(of_ddpm(variance, t, s), optimal, rtol=1e-7, atol=1e-10)


@every_schedule
def test_transitions_compose(schedule):
    t, s = pairs(schedule)
    r = schedule.level(s.t / 2)
    through_s = transition_variance(t, s) + (t.alpha / s.alpha) ** 2 * transition_variance(s, r)
    assert_close(transition_variance(t, r), through_s, rtol=1e-9, atol=1e-12)


@every_schedule
def test_step_to_the_data_has_no_small_variance_and_all_of_the_large(schedule):
    t = schedule.level(torch.linspace(*schedule.t_range, 20, dtype=torch.float64))
    data = schedule.level(torch.zeros_like(t.t))
    step = ReverseStep.of(t, data)
    assert (of_ddpm(FixedSmall(), t, data) == 0).all()
    assert_close(of_ddpm(FixedLarge(), t, data), t.sigma**2, rtol=1e-12, atol=0)
    assert_close(step.of_x_0, torch.ones_like(t.t), rtol=0, atol=1e-12)
    assert (step.of_x_t == 0).all()


@every_schedule
@every_eta
def test_steps_of_floats_are_those_of_tensors(schedule, eta):
    t, s = pairs(schedule)
    step = ReverseStep.of(t, s, eta)
    for i, ends in enumerate(zip(levels(schedule, t.t), levels(schedule, s.t), strict=True)):
        numbers = ReverseStep.of(*ends, eta)
        assert all(isinstance(number, float) for number in numbers)
        assert_close(torch.tensor(numbers, dtype=torch.float64), torch.stack([v[i] for v in step]), rtol=1e-9, atol=0)
        for variance in (FixedSmall(), FixedLarge()):
            of_x_0 = variance.at(*ends)(NOTHING)
            assert isinstance(of_x_0, float)
            assert of_x_0 == pytest.approx(variance.at(t, s)(NOTHING)[i].item(), rel=1e-9)


@every_schedule
def test_estimates_of_the_variance_of_x_0_are_not_negative(schedule):
    for t, s in (pairs(schedule), neighbours(schedule)):
        assert (FixedSmall().at(t, s)(NOTHING) == 0).all()
        assert (FixedLarge().at(t, s)(NOTHING) > 0).all()


@every_eta
def test_step_from_pure_noise_forgets_x_t_but_for_what_it_keeps_of_eps(eta):
    t, s = Level(1.0, 0.0, 1.0), Level(0.5, 0.6, 0.8)
    assert ReverseStep.of(t, s, eta) == pytest.approx((0.8 * (1 - eta**2) ** 0.5, 0.6, (0.8 * eta) ** 2))
