"""Dequantized pixels lie in their bins with a known density, so that E_q[log p - log q] bounds the mass of the bin."""

from math import log, pi

import pytest
import torch
from cases import each
from exact import Says
from torch.func import grad
from torch.special import ndtr, ndtri

from diffusion_trainer.process.levels import Level
from diffusion_trainer.sampling.dequantization import (
    HALF_BIN,
    CleanEnd,
    TruncatedNormalDequantization,
    UniformDequantization,
    centres,
)
from diffusion_trainer.sampling.variational_dequantization import FittedDequantization

CLEAN = CleanEnd(
    Level(0.001, 0.9, 0.0045), Says(lambda x_t: 0 * x_t)
)  # sigma / alpha = 0.005, a little more than half a bin
OPTIONS = {
    "uniform": UniformDequantization(),
    "of the level": TruncatedNormalDequantization(),
    "narrow": TruncatedNormalDequantization(0.0005),
    "wide": TruncatedNormalDequantization(10.0),
    "fitted": FittedDequantization(*torch.tensor([[[0.1]], [[0.0005]], [[-0.5]]]).double().expand(3, 3, 3), {}),
}
every_option = each("dequantization", OPTIONS)
N = 4001
QUANTILES = ndtri((torch.arange(N, dtype=torch.float64) + 0.5) / N)  # normals that are equally likely


def draws(dequantization, pixel):
    """x_0 (N,) and log q (N,) of one pixel, for equally likely normals."""
    pixels = torch.full((N, 1), pixel, dtype=torch.uint8)
    x_0, log_q = dequantization(pixels, CLEAN, QUANTILES[:, None])
    return x_0[:, 0], log_q


def log_normal(x, mean=0.0, std=1.0):
    return -((x - mean) ** 2) / (2 * std**2) - log(std) - log(2 * pi) / 2


def log_bin_mass(pixel, mean, std):
    x = centres(torch.tensor(pixel, dtype=torch.uint8))
    return (ndtr((x + HALF_BIN - mean) / std) - ndtr((x - HALF_BIN - mean) / std)).log()


@every_option
@pytest.mark.parametrize("pixel", [0, 100, 255])
def test_draws_fill_the_bin_and_nothing_else(dequantization, pixel):
    x_0, _ = draws(dequantization, pixel)
    low, high = (pixel - 0.5) / 127.5 - 1, (pixel + 0.5) / 127.5 - 1
    assert ((low - 1e-12 <= x_0) & (x_0 <= high + 1e-12)).all()
    assert ((x_0 + 1) * 127.5).round().eq(pixel).all()  # as the package rounds
    if dequantization != OPTIONS["narrow"]:
        assert x_0.max() - x_0.min() > 0.999 * (high - low)


@every_option
def test_density_is_that_of_the_draws(dequantization):
    """By the change of variables: q(x_0) |d x_0 / d normal| = N(normal; 0, 1). Hence q integrates to one."""
    pixels = torch.tensor([[77]], dtype=torch.uint8)

    def x_0(normal):
        return dequantization(pixels, CLEAN, normal.reshape(1, 1))[0].squeeze()

    for normal in (-2.0, -0.3, 0.0, 1.1, 2.5):
        normal = torch.tensor(normal, dtype=torch.float64)
        _, log_q = dequantization(pixels, CLEAN, normal.reshape(1, 1))
        torch.testing.assert_close(log_q[0] + grad(x_0)(normal).log(), log_normal(normal), rtol=0, atol=1e-6)


@every_option
@pytest.mark.parametrize("pixel", [0, 140, 255])
@pytest.mark.parametrize("std", [0.4, 0.01, 0.003])
def test_bound_is_below_the_log_mass_of_the_bin(dequantization, pixel, std):
    mean = 0.1 if std == 0.4 else centres(torch.tensor(pixel, dtype=torch.uint8)).item() + 0.004
    x_0, log_q = draws(dequantization, pixel)
    bound, truth = (log_normal(x_0, mean, std) - log_q).mean(), log_bin_mass(pixel, mean, std)
    assert bound < truth
    if std == 0.4 and dequantization in (OPTIONS["uniform"], OPTIONS["wide"]):  # p is flat within a bin, and so is q
        assert truth - bound < 1e-3


@pytest.mark.parametrize("scale", [0.002, 0.02])
def test_bound_is_tight_where_q_is_the_posterior(scale):
    """p normal around the pixel with the scale of q: log p - log q is the log mass of the bin for each draw."""
    x_0, log_q = draws(TruncatedNormalDequantization(scale), 55)
    mean = 55 / 127.5 - 1
    gap = log_normal(x_0, mean, scale) - log_q - log_bin_mass(55, mean, scale)
    assert gap.abs().max() < 1e-9


def test_scale_null_is_the_noise_of_the_clean_level():
    for ours, theirs in zip(
        draws(TruncatedNormalDequantization(), 9), draws(TruncatedNormalDequantization(0.005), 9), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@every_option
def test_log_q_sums_over_dimensions_and_x_0_has_the_dtype_of_the_noise(dequantization):
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normal = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    x_0, log_q = dequantization(pixels, CLEAN, normal)
    assert x_0.dtype == torch.float32
    assert log_q.dtype == torch.float64
    single = [
        dequantization(p.reshape(1, 1), CLEAN, z.reshape(1, 1))[1]
        for p, z in zip(pixels.flatten(), normal.flatten(), strict=True)
    ]
    torch.testing.assert_close(log_q, torch.stack(single).reshape(2, -1).sum(1))


def test_refusals():
    with pytest.raises(ValueError, match="uint8"):
        UniformDequantization()(torch.zeros(1, 1), CLEAN, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="scale must be positive"):
        TruncatedNormalDequantization(0.0)
