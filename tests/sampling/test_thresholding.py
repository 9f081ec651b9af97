"""Thresholds of x_0_hat, against the definitions of Saharia et al. 2022."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.variances import Estimate
from diffusion_trainer.sampling.thresholding import DynamicThreshold, StaticThreshold, quantile

NOISY = Level(0.5, 0.8, 0.6)


@dataclass(frozen=True)
class Says(Denoiser):
    """Always the same, with a second output."""

    x_0_hat: Tensor

    def __call__(self, x_t, level, condition):
        return Estimate(self.x_0_hat, 7 * self.x_0_hat)

    def null(self, condition):
        return -condition


def images(*spreads):
    """One normal (3, 8, 8) for each standard deviation."""
    x = torch.randn(len(spreads), 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x * torch.tensor(spreads, dtype=torch.float64)[:, None, None, None]


def thresholded(guidance, x_0_hat):
    return guidance(Says(x_0_hat))(x_0_hat, NOISY, None).x_0_hat


@pytest.mark.parametrize("bound", [1.0, 2.5])
def test_static_threshold_clips_at_the_bound(bound):
    x = images(1.0, 5.0)
    clipped = thresholded(StaticThreshold(bound), x)
    assert clipped.abs().max() == bound
    inside = x.abs() < bound
    assert torch.equal(clipped[inside], x[inside])
    assert torch.equal(clipped[~inside], bound * x[~inside].sign())


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_clips_at_the_quantile_of_each_sample_and_divides_by_it(percentile):
    x = images(0.01, 0.7, 1.0, 3.0, 40.0)
    got = thresholded(DynamicThreshold(percentile), x)
    for i in range(len(x)):
        s = max(1.0, torch.quantile(x[i].abs(), percentile).item())
        assert_close(got[i], x[i].clamp(-s, s) / s, rtol=1e-12, atol=1e-12)
    assert got.abs().max() == 1
    assert torch.equal(got[0], x[0])  # in range already: untouched


def test_dynamic_threshold_of_all_values_scales_and_clips_nothing():
    x = images(4.0)
    assert_close(thresholded(DynamicThreshold(1.0), x), x / x.abs().max(), rtol=1e-12, atol=1e-12)


def test_samples_do_not_feel_each_other():
    x = images(2.0, 3.0, 50.0)
    together = thresholded(DynamicThreshold(), x)
    for i in range(3):
        assert_close(together[i : i + 1], thresholded(DynamicThreshold(), x[i : i + 1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 201])
@pytest.mark.parametrize("q", [1e-3, 0.25, 0.5, 0.9, 0.995, 1.0])
def test_quantile_is_the_linearly_interpolated_one(q, n):
    values = torch.randn(4, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    assert_close(quantile(values, q), torch.quantile(values, q, dim=1), rtol=1e-12, atol=1e-12)


def test_quantile_of_a_batch_that_torchs_own_refuses():
    values = torch.zeros(2, 2**23, dtype=torch.float32)
    values[:, -3:] = torch.tensor([3.0, 4.0, 5.0])
    assert quantile(values, 1.0).tolist() == [5, 5]
    assert quantile(values, 1 - 2e-7).tolist() == pytest.approx([3.32, 3.32], abs=0.03)  # 1.68 places below the largest


@pytest.mark.parametrize("guidance", [StaticThreshold(), DynamicThreshold()], ids=str)
def test_second_output_and_null_pass_through(guidance):
    x = images(3.0)
    guided = guidance(Says(x))
    assert torch.equal(guided(x, NOISY, None).second, 7 * x)
    assert guided.null(3) == -3


@pytest.mark.parametrize("make", [DynamicThreshold, StaticThreshold])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_arguments_are_refused(make, value):
    with pytest.raises(ValueError, match=r"(percentile|bound) must .*not"):
        make(value)
