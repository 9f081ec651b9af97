"""Predictions: the algebra of target and estimate, for every yaml of conf/prediction."""

import pytest
import torch
from exact import GAUSSIAN, MIXTURE, ExactNetwork
from options import built, each
from torch.testing import assert_close

from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.predictions import Epsilon

every_prediction = each("prediction", built("prediction"))
every_schedule = each("schedule", built("schedule"))
every_data = each("data", {"gaussian": GAUSSIAN, "mixture": MIXTURE})


def noisy_images(seed=0):
    """x_0, eps, x_t (5, 3, 4, 4) and alpha, sigma (5,), a noise level of its own for each sample."""
    generator = torch.Generator().manual_seed(seed)
    x_0, eps = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    angle = 0.1 + 1.3 * torch.rand(5, generator=generator, dtype=torch.float64)
    alpha, sigma = angle.cos(), angle.sin()
    return x_0, eps, alpha[:, None, None, None] * x_0 + sigma[:, None, None, None] * eps, alpha, sigma


@every_prediction
def test_estimate_of_the_target_is_x_0(prediction):
    x_0, _, x_t, alpha, sigma = noisy_images()
    c = prediction.coefficients(alpha, sigma)
    assert_close(prediction.x_0_hat(prediction.target(x_0, x_t, c), x_t, c), x_0, rtol=1e-10, atol=1e-10)


@every_prediction
def test_error_of_x_0_is_the_output_coefficient_times_the_error_of_the_output(prediction):
    x_0, eps, x_t, alpha, sigma = noisy_images()
    c = prediction.coefficients(alpha, sigma)
    off = prediction.x_0_hat(prediction.target(x_0, x_t, c) + eps, x_t, c) - x_0
    assert_close(off, c.out[:, None, None, None] * eps, rtol=1e-9, atol=1e-9)


@every_prediction
def test_coefficients_are_one_number_for_each_sample(prediction):
    _, _, _, alpha, sigma = noisy_images()
    assert all(c.shape == alpha.shape and c.isfinite().all() for c in prediction.coefficients(alpha, sigma))


def test_target_of_epsilon_is_the_noise():
    x_0, eps, x_t, alpha, sigma = noisy_images()
    assert_close(Epsilon().target(x_0, x_t, Epsilon().coefficients(alpha, sigma)), eps, rtol=1e-9, atol=1e-9)


@every_data
@pytest.mark.parametrize("log_snr", [-6.0, 0.0, 6.0])
def test_exact_noise_gives_the_exact_estimate(data, log_snr):
    log_snr = torch.full((50,), log_snr, dtype=torch.float64)
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    x_t = data.sample_t(50, alpha, sigma, torch.Generator().manual_seed(0))
    eps_hat = -sigma[:, None] * data.score(x_t, alpha, sigma)
    estimate = Epsilon().x_0_hat(eps_hat, x_t, Epsilon().coefficients(alpha, sigma))
    assert_close(estimate, data.denoise(x_t, alpha, sigma), rtol=1e-8, atol=1e-8)


@every_schedule
@every_data
def test_denoiser_of_the_exact_network_is_exact_at_every_time(schedule, data):
    t = torch.linspace(*schedule.t_range, 64, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = data.sample_t(64, alpha, sigma, torch.Generator().manual_seed(0))
    denoise = NetworkDenoiser(ExactNetwork(data), lambda condition: condition, schedule, Epsilon())
    assert_close(denoise(x_t, t, None), data.denoise(x_t, alpha, sigma), rtol=1e-7, atol=1e-7)


@every_prediction
def test_estimate_keeps_the_dtype_of_x_t_whatever_the_network_computes_in(prediction):
    x_0, _, x_t, alpha, sigma = noisy_images()
    c = prediction.coefficients(alpha.float(), sigma.float())
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert prediction.x_0_hat(x_0.to(dtype), x_t.float(), c).dtype == torch.float32
