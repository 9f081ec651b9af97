"""The variational bound: each term by brute force, and its sum against the likelihood that it bounds."""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import log

import pytest
import torch
from cases import each
from exact import GAUSSIAN, MIXTURE, ExactDenoiser
from options import built
from oracle import Mixture, forward_posterior, gaussian_kl
from solving import Noise
from torch.distributions import Normal
from torch.special import ndtr

from diffusion_trainer.process.decoders import DiscretizedGaussian, GaussianDensity
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.schedules import Cosine, RectifiedFlow
from diffusion_trainer.process.variances import FixedLarge, FixedSmall, PosteriorVariance, transition_variance
from diffusion_trainer.process.weightings import Elbo
from diffusion_trainer.sampling.bound import VariationalBound
from diffusion_trainer.sampling.dequantization import centres
from diffusion_trainer.sampling.grids import UniformTime

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
every_schedule = each("schedule", SCHEDULES)
MEAN, STD = torch.tensor([0.5, -0.3], dtype=torch.float64), 0.6
ISOTROPIC = Mixture.gaussian(MEAN, STD**2 * torch.eye(2))


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def numbers(level):
    return f64(level.alpha), f64(level.sigma)


def at_times(schedule, num_steps):
    return levels(schedule, UniformTime()(schedule, num_steps))


def bound(num_steps, x_0_bound=None, decoder=None):
    return VariationalBound(UniformTime(), num_steps, decoder or GaussianDensity(), x_0_bound)


@dataclass(frozen=True)
class Optimal(PosteriorVariance):
    """Var[x_0 | x_t] of ISOTROPIC."""

    def at(self, t, s):
        return lambda estimate: STD**2 * t.sigma**2 / (STD**2 * t.alpha**2 + t.sigma**2)


@dataclass(frozen=True)
class OfEstimate(PosteriorVariance):
    """A tensor that differs in each entry, as a network's would."""

    def at(self, t, s):
        return lambda estimate: 0.1 + estimate.x_0_hat**2


def reverse_variance(variance, t, s, x_0_hat):
    """Of p(x_s | x_t), from the papers, not from ReverseStep."""
    kept = forward_posterior(x_0_hat, x_0_hat, *numbers(t), *numbers(s))[1]
    if variance == FixedSmall():
        return kept
    if variance == FixedLarge():
        return torch.full_like(kept, transition_variance(t, s))
    of_x_0 = (
        forward_posterior(x_0_hat + 1, x_0_hat, *numbers(t), *numbers(s))[0]
        - forward_posterior(x_0_hat, x_0_hat, *numbers(t), *numbers(s))[0]
    )
    return kept + of_x_0**2 * (0.1 + x_0_hat**2)


@every_schedule
@pytest.mark.parametrize(("variance", "x_0_bound"), [(FixedSmall(), 0.8), (FixedLarge(), None), (OfEstimate(), 0.8)])
def test_terms_are_the_divergences_of_the_two_chains(schedule, variance, x_0_bound):
    x_0 = MIXTURE.sample(16, torch.Generator().manual_seed(0))[0]
    terms = bound(7, x_0_bound).terms(ExactDenoiser(MIXTURE), schedule, variance, x_0, None, Noise(16))
    noise, at = Noise(16), at_times(schedule, 7)
    alpha_T, sigma_T = numbers(at[0])
    prior = gaussian_kl(alpha_T * x_0, sigma_T**2, torch.zeros_like(x_0), sigma_T**2)
    torch.testing.assert_close(terms.prior, prior)

    def estimate(t):
        alpha, sigma = numbers(t)
        x_t = alpha * x_0 + sigma * noise()
        x_0_hat = MIXTURE.denoise(x_t, alpha, sigma)
        return x_t, x_0_hat if x_0_bound is None else x_0_hat.clamp(-x_0_bound, x_0_bound)

    for k, (t, s) in enumerate(pairwise(at[:-1])):
        x_t, x_0_hat = estimate(t)
        q = forward_posterior(x_0, x_t, *numbers(t), *numbers(s))
        p = forward_posterior(x_0_hat, x_t, *numbers(t), *numbers(s))[0], reverse_variance(variance, t, s, x_0_hat)
        torch.testing.assert_close(terms.diffusion[:, k], gaussian_kl(*q, *p), rtol=1e-7, atol=1e-9)
    _, x_0_hat = estimate(at[-2])
    second = reverse_variance(FixedSmall(), at[-3], at[-2], x_0_hat)
    last = {FixedSmall(): second, FixedLarge(): f64(at[-2].sigma ** 2)}.get(variance, 0.1 + x_0_hat**2)
    decoded = Normal(x_0_hat, last.expand_as(x_0_hat).sqrt()).log_prob(x_0).sum(1)
    torch.testing.assert_close(terms.decoder, -decoded, rtol=1e-7, atol=1e-9)
    assert terms.diffusion.shape == (16, 6)


def expectation_points(schedule, variance, num_steps):
    """Terms at 8 points whose mean is the expectation over x_0 ~ ISOTROPIC and the noises, exactly.

    Each term is a quadratic in (x_0, eps), four standard normals, and the points are +-2 on each of their axes.
    """
    points = torch.cat([2 * torch.eye(4), -2 * torch.eye(4)]).double()
    x_0 = MEAN + STD * points[:, :2]
    return bound(num_steps).terms(ExactDenoiser(ISOTROPIC), schedule, variance, x_0, None, lambda: points[:, 2:])


def entropy():
    return 2 * (0.5 * log(2 * torch.pi) + 0.5 + log(STD))


def prior_gap(t):
    """KL(q(x_T) || N(0, sigma_T^2 I)) of ISOTROPIC."""
    alpha, sigma = numbers(t)
    variance = (alpha**2 * STD**2 + sigma**2).expand(2)
    return gaussian_kl(alpha * MEAN, variance, torch.zeros(2), (sigma**2).expand(2)).item()


@every_schedule
def test_bound_is_the_entropy_where_every_reverse_step_is_exact(schedule):
    """Exact mean and variance on isotropic Gaussian data: only the samplers' prior is not that of the data."""
    terms = expectation_points(schedule, Optimal(), 5)
    total = terms.prior.mean() + terms.diffusion.sum(1).mean() + terms.decoder.mean()
    assert abs(total - entropy() - prior_gap(at_times(schedule, 5)[0])) < 1e-8


@every_schedule
@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()])
def test_gap_of_the_fixed_variances_is_the_divergence_from_the_optimal_ones(schedule, variance):
    terms, at, zero = expectation_points(schedule, variance, 5), at_times(schedule, 5), torch.zeros(2).double()
    gap = prior_gap(at[0])
    for t, s in pairwise(at[:-1]):
        best = ISOTROPIC.optimal_variance(*numbers(s), *numbers(t)).expand(2)
        gap += gaussian_kl(zero, best, zero, reverse_variance(variance, t, s, zero[None])[0]).item()
    posterior = f64(Optimal().at(at[-2], at[-1])(None)).expand(2)
    last = reverse_variance(FixedSmall(), at[-3], at[-2], zero[None])[0]
    last = last if variance == FixedSmall() else f64(at[-2].sigma ** 2).expand(2)
    gap += gaussian_kl(zero, posterior, zero, last).item()
    assert gap > 1e-3
    total = terms.prior.mean() + terms.diffusion.sum(1).mean() + terms.decoder.mean()
    assert abs(total.item() - entropy() - gap) < 1e-7 * gap + 1e-8


def test_bound_of_pixels_is_the_mass_of_their_bins():
    """The bound of each image is tight where reverse steps are exact; bins are narrow against all variances here."""
    pixels = torch.tensor([[0, 255], [30, 100], [128, 127], [250, 3]], dtype=torch.uint8)
    x_0, signs = centres(pixels), torch.cat([2**0.5 * torch.eye(2), -(2**0.5) * torch.eye(2)]).double()
    likelihood = bound(10, decoder=DiscretizedGaussian())
    schedule = RectifiedFlow(t_max=0.9999)
    inner = pixels[1:3].repeat_interleave(4, 0)  # not at the ends, whose bins are open
    bits = likelihood(ExactDenoiser(ISOTROPIC), schedule, Optimal(), inner, None, lambda: signs.repeat(2, 1))
    low, high = (ndtr((x_0[1:3] + side - MEAN) / STD) for side in (-1 / 255, 1 / 255))
    truth = -(high - low).log2().mean(1)
    torch.testing.assert_close(bits["bits_per_dim"].reshape(2, 4).mean(1), truth, rtol=0, atol=1e-3)
    assert set(bits) == {"prior", "diffusion", "decoder", "bits_per_dim"}


def test_loss_of_the_elbo_weighting_is_the_diffusion_part():
    """The weights that training uses are those of the bound's KL terms (which beta-tilde leaves nothing else)."""
    schedule, steps = SCHEDULES["linear"], 1000
    x_0, noise = GAUSSIAN.sample(4, torch.Generator().manual_seed(0))[0], Noise(4)
    terms = bound(steps).terms(ExactDenoiser(GAUSSIAN), schedule, FixedSmall(), x_0, None, Noise(4))
    weights = Elbo(FixedSmall(), steps)(schedule, schedule.level(UniformTime()(schedule, steps)[:-1]))
    for k in range(steps - 1):
        alpha, sigma = (f(f64(1 - k / steps)) for f in (schedule.alpha, schedule.sigma))
        error = (GAUSSIAN.denoise(alpha * x_0 + sigma * noise(), alpha, sigma) - x_0).square().sum(1)
        if k % 100 == 0:
            torch.testing.assert_close(terms.diffusion[:, k], weights[k] * error / steps, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("std", [1e-9, 1e-6, 1e-3, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, 0.0041, 0.9, 1.2])
@pytest.mark.parametrize("count", [256, 17, 2])
def test_discretized_gaussian_sums_to_one(std, mean, count):
    x_0 = torch.linspace(-1, 1, count, dtype=torch.float64)[:, None]
    log_mass = DiscretizedGaussian(count)(x_0, f64(mean), f64(std**2))
    assert log_mass.shape == (count,)
    assert log_mass.isfinite().all()
    assert abs(log_mass.logsumexp(0)) < 1e-9


def test_discretized_gaussian_is_the_density_times_the_bin_where_that_is_narrow():
    x_0 = centres(torch.tensor([[51, 153]], dtype=torch.uint8))
    mean, variance = f64([[0.3, -0.1]]), f64([[0.1, 0.3]])
    expected = GaussianDensity()(x_0, mean, variance) + 2 * log(2 / 255)
    torch.testing.assert_close(DiscretizedGaussian()(x_0, mean, variance), expected, rtol=0, atol=1e-3)


def test_discretized_gaussian_keeps_its_digits_far_out():
    """log(Phi(high) - Phi(low)) is log Phi(high) there, that is -high^2 / 2 - log(-high sqrt(2 pi)) + O(high^-2)."""
    for x, mean in ((-1.0, 1.0), (1.0, -1.0), (0.0 + 1 / 255, 1.0), (-1 / 255, -1.0)):
        high = (abs(x - mean) - 1 / 255) / 1e-3
        log_mass = DiscretizedGaussian()(f64([[x]]), f64(mean), f64(1e-6))
        expected = -(high**2) / 2 - log(high) - log(2 * torch.pi) / 2
        torch.testing.assert_close(log_mass, f64([expected]), rtol=0, atol=1e-4)


def test_noise_is_asked_for_once_for_each_time():
    noise = Noise(3)
    pixels = torch.zeros(3, 2, dtype=torch.uint8)
    pixelwise = replace(bound(9), decoder=DiscretizedGaussian())
    pixelwise(ExactDenoiser(GAUSSIAN), Cosine(), FixedSmall(), pixels, None, noise)
    assert noise.calls == 9


@pytest.mark.parametrize("decoder", [GaussianDensity(), DiscretizedGaussian(2)], ids=str)
def test_pixels_have_their_own_decoder(decoder):
    pixels = torch.zeros(3, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="8-bit pixels have 256 levels"):
        replace(bound(9), decoder=decoder)(ExactDenoiser(GAUSSIAN), Cosine(), FixedSmall(), pixels, None, Noise(3))


def test_refusals():
    with pytest.raises(ValueError, match="num_steps must be at least 2"):
        bound(1)
    with pytest.raises(ValueError, match="x_0_bound must be positive or null"):
        replace(bound(2), x_0_bound=0.0)
    with pytest.raises(ValueError, match="levels must be at least 2"):
        DiscretizedGaussian(1)
