"""Decoders: a probability over all pixel values, a density whose integral is one, and digits far out in the tails."""

import numpy as np
import pytest
import torch
from cases import each
from scipy.integrate import quad
from scipy.stats import norm
from torch.testing import assert_close

from diffusion_trainer.process.decoders import DiscretizedGaussian, GaussianDensity

every_levels = each("levels", [2, 3, 256])


def values(levels):
    return torch.linspace(-1, 1, levels, dtype=torch.float64)[:, None]


@every_levels
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.9, 0.001), (-1.2, 0.05), (3.0, 0.5), (0.3, 20.0)])
def test_probabilities_of_all_values_sum_to_one(levels, mean, std):
    x = values(levels)
    log_p = DiscretizedGaussian(levels)(x, torch.full_like(x, mean), torch.full_like(x, std**2))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


@every_levels
def test_mass_of_each_value_is_the_difference_of_two_normal_cdfs(levels):
    x, half = values(levels), 1 / (levels - 1)
    given = DiscretizedGaussian(levels)(x, torch.full_like(x, 0.2), torch.full_like(x, 0.25)).exp()
    edges = norm.cdf((x[:, 0].numpy() + half - 0.2) / 0.5) - norm.cdf((x[:, 0].numpy() - half - 0.2) / 0.5)
    edges[0], edges[-1] = norm.cdf((-1 + half - 0.2) / 0.5), norm.sf((1 - half - 0.2) / 0.5)
    assert_close(given, torch.from_numpy(edges), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_digits_are_kept_far_out_on_both_sides(sign):
    """100 standard deviations away, where the cdf rounds to 0 or 1: the mass is that of its nearest edge."""
    x, mean = torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([[sign * 1.0]], dtype=torch.float64)
    given = DiscretizedGaussian(257)(x, mean, torch.full_like(x, 1e-4)).item()
    near, far = (1 - 1 / 256) / 0.01, (1 + 1 / 256) / 0.01
    known = norm.logsf(near)  # the other edge has exp(-78) of it
    assert norm.logsf(far) < known - 70
    assert given == pytest.approx(known, rel=1e-12)


def test_gradients_are_finite_far_out_and_at_the_open_ends():
    x = torch.tensor([[-1.0, 1.0, 0.0, 127 / 127.5 - 1]], dtype=torch.float64)
    for mean in (-30.0, -1.0, 0.0, 1.0, 30.0):
        m = torch.full_like(x, mean).requires_grad_()
        variance = torch.full_like(x, 1e-4).requires_grad_()
        gradients = torch.autograd.grad(DiscretizedGaussian()(x, m, variance).sum(), [m, variance])
        assert all(g.isfinite().all() for g in gradients)


def test_density_is_that_of_the_normal_summed_over_entries():
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    given = GaussianDensity()(x, x / 2, variance)
    known = norm.logpdf(x, x / 2, variance.sqrt()).sum((1, 2))
    assert_close(given, torch.from_numpy(known))


def test_narrow_bins_turn_the_mass_into_the_density():
    x = values(2**16 + 1)[2**15 - 20 : 2**15 + 20]
    mass = DiscretizedGaussian(2**16 + 1)(x, torch.zeros_like(x), torch.full_like(x, 0.1))
    density = GaussianDensity()(x, torch.zeros_like(x), torch.full_like(x, 0.1))
    assert_close(mass - torch.tensor(2 / 2**16, dtype=torch.float64).log(), density, rtol=0, atol=1e-6)


def cost_by_quadrature(width):
    """The mean of -log(Phi(z + width / 2) - Phi(z - width / 2)) over z ~ N(0, 1)."""

    def weighed(z):
        near, far = norm.logsf(abs(z) - width / 2), norm.logsf(abs(z) + width / 2)
        return -(near + np.log(-np.expm1(far - near))) * norm.pdf(z)

    edges = [-width / 2, 0, width / 2] if width < 20 else None
    return quad(weighed, -12, 12, points=edges, epsabs=1e-13, limit=500)[0]


@pytest.mark.parametrize("std", [1e-6, 1e-4, 5e-4, 2e-3, 4e-3, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("levels", [3, 256])
def test_expected_cost_is_the_mean_over_normal_errors(levels, std):
    given = DiscretizedGaussian(levels).expected_cost(torch.tensor([[std**2]], dtype=torch.float64))
    assert given.shape == (1, 1)
    assert given.item() == pytest.approx(cost_by_quadrature(2 / (levels - 1) / std), rel=1e-9, abs=1e-12)


def test_expected_cost_is_the_entropy_of_the_density_over_narrow_bins_and_nothing_over_wide_ones():
    variance = torch.tensor([1.0, 0.04, 1e-8], dtype=torch.float64)
    cost = DiscretizedGaussian().expected_cost(variance)
    entropy = torch.from_numpy(norm.entropy(scale=variance.sqrt())) - torch.tensor(2 / 255, dtype=torch.float64).log()
    assert_close(cost[:2], entropy[:2], rtol=0, atol=1e-6)
    assert 0 <= cost[2] < 1e-100
    assert entropy[2] < -2


@pytest.mark.parametrize("levels", [0, 1])
def test_fewer_than_two_levels_are_refused(levels):
    with pytest.raises(ValueError, match="levels must be at least 2"):
        DiscretizedGaussian(levels)
