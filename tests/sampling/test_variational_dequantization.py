"""A dequantization that is fitted to a model: where the best q is known it is found, and its bound is one."""

from math import log

import pytest
import torch
from exact import ExactDenoiser, Says
from oracle import Mixture
from solving import Noise
from torch.special import ndtr

from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.schedules import RectifiedFlow
from diffusion_trainer.process.variances import FixedSmall
from diffusion_trainer.sampling.dequantization import (
    HALF_BIN,
    CleanEnd,
    TruncatedNormalDequantization,
    UniformDequantization,
    centres,
)
from diffusion_trainer.sampling.likelihood import FlowLikelihood
from diffusion_trainer.sampling.variational_dequantization import VariationalDequantization

CLEAN = Level(0.001, 0.9, 0.0009)  # sigma / alpha = 0.001, a quarter of half a bin
SCALE = CLEAN.sigma / CLEAN.alpha
VARIATIONAL = VariationalDequantization(num_images=512, batch_size=256)
FIXED = {"uniform": UniformDequantization(), "of the level": TruncatedNormalDequantization()}


def half_bins(*numbers):
    return HALF_BIN * torch.tensor(numbers, dtype=torch.float64)


def clean_end(weights, means, stds):
    """The exact model of a mixture (K, 2) whose density at the level has these standard deviations, independently."""
    return CleanEnd(CLEAN, ExactDenoiser(Mixture(weights, means, (stds**2 - SCALE**2).diag_embed())))


def log_density(clean, x_0):
    return clean.denoiser.data.log_density(x_0, torch.tensor(1.0), torch.tensor(clean.scale))


def log_bin_mass(weights, means, stds, pixels):
    """(B,) of pixels (B, 2), in closed form."""
    x = centres(pixels)[:, None]
    each = ndtr((x + HALF_BIN - means) / stds) - ndtr((x - HALF_BIN - means) / stds)
    return (each.prod(-1) @ torch.as_tensor(weights, dtype=torch.float64)).log()


def pixels_of(clean, n=512):
    x_0 = clean.denoiser.data.sample_t(
        n, torch.tensor(1.0), torch.tensor(clean.scale), torch.Generator().manual_seed(0)
    )
    return ((x_0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def gaps(dequantization, clean, truth, pixels, draws=64):
    """(draws, B): log mass of the bins less the bound, draw by draw, in nats."""
    noise = Noise(len(pixels), seed=5)
    drawn = [dequantization(pixels, clean, noise()) for _ in range(draws)]
    return torch.stack([truth - log_density(clean, x_0) + log_q for x_0, log_q in drawn])


GREYS = centres(torch.tensor([100, 140], dtype=torch.uint8))


@pytest.mark.parametrize("stds", [(0.3, 0.9), (0.6, 0.26)])
def test_the_posterior_is_found_where_the_family_has_it(stds):
    """Of a Gaussian whose mean lies anywhere in its bin: q(x_0 | pixels) = p(x_0 | x_0 in the bin), for each pixel
    value another, and log p - log q is the log mass of the bin in each draw. The optimum: no offset, the Gaussian's own
    scale, and the gain that turns a score into the way to the mean, std^2 / scale^2.
    """
    mean, std = GREYS + half_bins(0.3, -0.8), half_bins(*stds)
    clean = clean_end([1.0], mean[None], std[None])
    pixels = pixels_of(clean)
    q = VARIATIONAL.fitted(clean, pixels, seed=0)
    torch.testing.assert_close(q.log_scale[1].exp(), std / HALF_BIN, rtol=0.01, atol=0)
    torch.testing.assert_close(q.gain[1], (std / SCALE) ** 2, rtol=0.01, atol=0)
    assert q.offset[1].abs().max() < 0.01
    truth = log_bin_mass([1.0], mean[None], std[None], pixels)
    assert gaps(q, clean, truth, pixels).abs().max() < 0.05
    for other in FIXED.values():
        assert gaps(other, clean, truth, pixels).mean() > 0.4


MIXTURES = {
    "two modes in the bins": ([0.4, 0.6], (0.5, -0.9), (-0.4, 0.2), (0.3, 0.5), (0.4, 0.3)),
    "wide": ([0.3, 0.7], (9.0, -20.0), (-12.0, 5.0), (30.0, 60.0), (40.0, 25.0)),
    "as sharp as its noise": ([0.5, 0.5], (0.0, 0.1), (2.0, -2.0), (0.26, 0.26), (0.26, 0.26)),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_bound_is_one_and_no_worse_than_what_is_not_fitted(name):
    weights, first, second, *stds = MIXTURES[name]
    means, stds = GREYS + torch.stack([half_bins(*first), half_bins(*second)]), half_bins(*stds).reshape(2, 2)
    clean = clean_end(weights, means, stds)
    pixels = pixels_of(clean)
    truth = log_bin_mass(weights, means, stds, pixels)
    ours = gaps(VARIATIONAL.fitted(clean, pixels, seed=0), clean, truth, pixels)
    assert ours.mean() > -3 * ours.std() / ours.numel() ** 0.5
    for other in FIXED.values():
        theirs = gaps(other, clean, truth, pixels)
        assert ours.mean() < theirs.mean() + 0.001  # nats of two dimensions
    assert ours.mean() < 0.25


def test_black_and_white_have_laws_of_their_own():
    """Their bins reach beyond [-1, 1], where data may have an end: here p is narrower in them than between."""
    narrow, wide = half_bins(0.3), half_bins(2.0)

    def x_0_hat(x_t):
        x, std = x_t.double() / CLEAN.alpha, torch.where(x_t.abs() > 0.99 * CLEAN.alpha, narrow, wide)
        mean = torch.where(x.abs() > 0.99, x.sign(), 0 * x)
        return (x - SCALE**2 * (x - mean) / std**2).to(x_t.dtype)

    pixels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).repeat(16)[:, None]
    q = VARIATIONAL.fitted(CleanEnd(CLEAN, Says(x_0_hat)), pixels, seed=0)
    scale = q.log_scale[:, 0].exp()
    torch.testing.assert_close(scale[[0, 2]], (narrow / HALF_BIN).expand(2), rtol=0.01, atol=0)
    assert scale[1] > 1


def test_the_likelihood_of_the_flow_has_this_bound():
    """Against the mass of the bins, of data far narrower than a bin: what uniform noise costs, the fit does not."""
    mean, std = GREYS + half_bins(0.4, -0.5), half_bins(0.4, 0.7)
    schedule = RectifiedFlow(t_min=5e-4, t_max=1.0)
    denoiser = ExactDenoiser(Mixture.gaussian(mean, (std**2).diag()))
    noisy = (std**2 + schedule.level_at(5e-4).sigma ** 2).sqrt()
    pixels = ((mean + noisy * Noise(128, seed=1)() + 1) * 127.5).round().to(torch.uint8)
    truth = -log_bin_mass([1.0], mean[None], noisy[None], pixels).mean() / log(2) / 2
    found = {}
    for name, dequantization in {**FIXED, "variational": VARIATIONAL}.items():
        likelihood = FlowLikelihood(dequantization, probes=0).fitted(denoiser, schedule, pixels, None, 0)
        found[name] = likelihood(denoiser, schedule, FixedSmall(), pixels, None, Noise(128))["bits_per_dim"].mean()
    assert abs(found["variational"] - truth) < 0.01
    assert found["variational"] < min(found[name] for name in FIXED) - 0.1


def test_a_fit_is_a_function_of_seed_and_images_and_says_what_it_found():
    clean = clean_end([1.0], GREYS[None], half_bins(0.5, 0.5)[None])
    pixels, few = pixels_of(clean), VariationalDequantization(num_steps=5)
    first, again, other = (few.fitted(clean, pixels, seed).learned for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert (first["num_images"], first["num_steps"], first["seed"]) == (512, 5, 0)
    assert first["scale"][1] == few.fitted(clean, pixels, 0).log_scale[1].exp().tolist()
    assert first["gain"][0] == [0.0, 0.0]  # no pixel is black: nothing was learned


def test_each_image_is_fitted_under_its_own_condition():
    clean = clean_end(
        [0.5, 0.5], GREYS + torch.stack([half_bins(0, 0), half_bins(9, 9)]), half_bins(0.3, 0.3).expand(2, 2)
    )
    k = torch.arange(64) % 2
    pixels = torch.stack([clean.denoiser.data.means[i] for i in k])
    pixels = ((pixels + 1) * 127.5).round().to(torch.uint8)
    given = VARIATIONAL.fitted(CleanEnd(CLEAN, clean.denoiser, k), pixels, 0)
    crossed = VARIATIONAL.fitted(CleanEnd(CLEAN, clean.denoiser, 1 - k), pixels, 0)
    assert given.log_scale[1].exp().sub(0.3).abs().max() < 0.01
    assert crossed.learned != given.learned


def test_refusals():
    for wrong in ({"num_images": 0}, {"num_steps": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            VariationalDequantization(**wrong)
    for lr in (0.0, -1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match=r"lr must lie in \(0, 1\]"):
            VariationalDequantization(lr=lr)
    clean, pixels = CleanEnd(CLEAN, Says(lambda x: x * float("nan"))), torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="fitted to a model before it is used"):
        VARIATIONAL(pixels, clean, torch.zeros(2, 2))
    with pytest.raises(UserError, match=r"not finite at t=0\.001, where VariationalDequantization"):
        VARIATIONAL.fitted(clean, pixels, 0)
    with pytest.raises(ValueError, match="uint8"):
        VARIATIONAL.fitted(clean, pixels.double(), 0)
