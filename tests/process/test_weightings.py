"""Weightings: the ELBO's weights are the KL terms of Ho et al. 2020 computed the long way, between Gaussians."""

import pytest
import torch
from options import built, each
from oracle import forward_posterior, gaussian_kl
from torch.func import jvp
from torch.testing import assert_close

from diffusion_trainer.process.predictions import Epsilon
from diffusion_trainer.process.variances import FixedLarge, FixedSmall
from diffusion_trainer.process.weightings import Elbo, Unit

SCHEDULES = built("schedule")
every_schedule = each("schedule", SCHEDULES)
every_variance = pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()], ids=str)
every_step = pytest.mark.parametrize("k", [2, 3, 10, 250, 700, 999])
T = 1000


class Step:
    """One reverse step k -> k-1 of a discrete DDPM with random x_0, eps and eps_hat, all (4, 3)."""

    def __init__(self, schedule, variance, k):
        self.x_0, self.eps, self.eps_hat = torch.randn(
            3, 4, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64
        )
        self.t = torch.full((4,), k / T, dtype=torch.float64)
        self.s = torch.full((4,), (k - 1) / T, dtype=torch.float64)
        self.alpha_t, sigma_t = schedule.alpha(self.t), schedule.sigma(self.t)
        self.alpha_s, sigma_s = schedule.alpha(self.s), schedule.sigma(self.s)
        x_t = self.alpha_t[:, None] * self.x_0 + sigma_t[:, None] * self.eps
        self.x_0_hat = (x_t - sigma_t[:, None] * self.eps_hat) / self.alpha_t[:, None]
        levels = self.alpha_t, sigma_t, self.alpha_s, sigma_s
        self.mean, self.posterior_variance = forward_posterior(self.x_0, x_t, *levels)
        self.model_mean, _ = forward_posterior(self.x_0_hat, x_t, *levels)
        self.beta = 1 - (self.alpha_t / self.alpha_s) ** 2
        large = self.beta[:, None].expand_as(self.mean)
        self.variance = self.posterior_variance if variance == FixedSmall() else large

    def kl(self):
        """KL(q(x_s|x_t,x_0) || p(x_s|x_t)), less the part of it that no network changes."""
        constant = gaussian_kl(self.mean, self.posterior_variance, self.mean, self.variance)
        return gaussian_kl(self.mean, self.posterior_variance, self.model_mean, self.variance) - constant

    def weighted(self, weight):
        return weight * (self.x_0_hat - self.x_0).square().sum(1) / T


@every_schedule
@every_variance
@every_step
def test_elbo_weight_is_the_kl_between_the_reverse_steps(schedule, variance, k):
    step = Step(schedule, variance, k)
    weighted = step.weighted(Elbo(variance, T)(schedule, step.t))
    assert_close(weighted, step.kl(), rtol=1e-6, atol=1e-12)  # Ho et al. 2020, eq. 8


@every_schedule
@every_variance
@every_step
def test_elbo_weight_is_equation_12_of_ho_on_the_error_of_the_noise(schedule, variance, k):
    step = Step(schedule, variance, k)
    alpha, alpha_bar = 1 - step.beta, step.alpha_t**2  # in Ho's letters
    coefficient = step.beta**2 / (2 * step.variance[:, 0] * alpha * (1 - alpha_bar))
    expected = coefficient * (step.eps - step.eps_hat).square().sum(1)
    assert_close(step.weighted(Elbo(variance, T)(schedule, step.t)), expected, rtol=1e-6, atol=1e-12)


@every_schedule
def test_elbo_weight_with_the_small_variance_is_half_the_difference_of_snrs(schedule):
    t = torch.linspace(2 / T, schedule.t_range[1], 500, dtype=torch.float64)  # Kingma et al. 2021, section 4
    snr_s, snr_t = schedule.log_snr(t - 1 / T).exp(), schedule.log_snr(t).exp()
    assert_close(Elbo(FixedSmall(), T)(schedule, t), T / 2 * (snr_s - snr_t), rtol=1e-7, atol=0)


@every_schedule
@every_variance
def test_elbo_weight_tends_to_minus_half_the_derivative_of_the_snr(schedule, variance):
    t = torch.linspace(0.0155, 0.9855, 98, dtype=torch.float64)  # off the kinks of the linear schedule, at k / 1000
    _, rate = jvp(lambda t: schedule.log_snr(t).exp(), (t,), (torch.ones_like(t),))
    assert_close(Elbo(variance, 10**6)(schedule, t), -rate / 2, rtol=1e-3, atol=0)  # Kingma et al. 2021, section 5


@every_schedule
@every_variance
def test_first_step_is_a_gaussian_decoder_with_the_variance_of_the_second(schedule, variance):
    first, second = (torch.tensor([k / T], dtype=torch.float64) for k in (1, 2))
    decoder = 1 / (2 * variance(schedule, second, first))  # of -log N(x_0; x_0_hat, variance)
    assert_close(Elbo(variance, T)(schedule, first) / T, decoder, rtol=1e-9, atol=0)
    assert decoder.isfinite().all()


@every_schedule
def test_unit_weight_times_the_error_of_x_0_is_the_error_of_the_noise(schedule):
    t = torch.linspace(*schedule.t_range, 100, dtype=torch.float64)
    out = Epsilon().coefficients(schedule.alpha(t), schedule.sigma(t)).out
    assert_close(Unit()(schedule, t) * out**2, torch.ones_like(t), rtol=1e-9, atol=0)


@every_schedule
@each("weighting", built("weighting"))
def test_weights_are_positive_and_finite_and_float32_keeps_three_digits(schedule, weighting):
    t = torch.linspace(*schedule.t_range, 1001)
    weight = weighting(schedule, t)
    assert weight.shape == t.shape
    assert weight.isfinite().all()
    assert (weight > 0).all()
    assert_close(weight.double(), weighting(schedule, t.double()), rtol=1e-3, atol=0)


def test_elbo_refuses_a_process_of_one_step():
    with pytest.raises(ValueError, match="num_timesteps"):
        Elbo(FixedSmall(), 1)
