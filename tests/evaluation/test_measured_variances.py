"""Analytic-DPM on the path of `diffusion-trainer variance`: from 20,000 samples to the variance of a reverse step.

Each image has 1,024 pixels, independent draws of a mixture in one dimension: the mean over 20 million squared errors
has a relative standard error of some 3e-4, of which 1e-3 is three.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import log

import pytest
import torch
from options import built
from oracle import Mixture
from torch.testing import assert_close

from diffusion_trainer.apps import statistics
from diffusion_trainer.conditioning.unconditional import Unconditional
from diffusion_trainer.evaluation.posterior_variance import PosteriorVarianceMeasurement, log_snr_grid
from diffusion_trainer.process.analytic import Analytic, Statistics
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.variances import Estimate, ReverseStep
from diffusion_trainer.training.agreement import Agreement

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
WEIGHTS, MEANS, VARIANCES = (0.3, 0.7), (0.8, -0.5), (0.04, 0.1)
DATA = Mixture(WEIGHTS, [[m] for m in MEANS], [[[v]] for v in VARIANCES])
COUNT, SHAPE = 20_000, (1, 32, 32)
OTHERS = ("ve", "edm", "rectified_flow", "sub_vp", "learned", "zero_terminal_snr")


@dataclass(frozen=True)
class ExactPixels(Denoiser):
    """DATA.denoise of every pixel, written out, as 20 million of them want."""

    def __call__(self, x_t, level, condition):
        of = [level.alpha**2 * v + level.sigma**2 for v in VARIANCES]
        off = [x_t - level.alpha * m for m in MEANS]
        logits = [log(w / v**0.5) - d.square() / (2 * v) for w, v, d in zip(WEIGHTS, of, off, strict=True)]
        means = [m + level.alpha * v / t * d for m, v, t, d in zip(MEANS, VARIANCES, of, off, strict=True)]
        return Estimate(torch.lerp(*means, (logits[1] - logits[0]).sigmoid()))

    def null(self, condition):
        return None


class Images:
    """Latents, as the measurement asks for them."""

    count, image_shape = COUNT, SHAPE

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        first = torch.rand(COUNT, *SHAPE, generator=generator) < WEIGHTS[0]
        normal = torch.randn(COUNT, *SHAPE, generator=generator)
        one, two = (m + v**0.5 * normal for m, v in zip(MEANS, VARIANCES, strict=True))
        self.images = torch.where(first, one, two)

    def batch(self, numbers):
        return {"image": self.images[list(numbers)]}


@pytest.fixture(scope="module")
def images():
    return Images()


def truth(level):
    """E Var[x_0 | x_t], by the trapezoidal rule over all x_t."""
    at = torch.tensor(level.alpha, dtype=torch.float64), torch.tensor(level.sigma, dtype=torch.float64)
    width = DATA.covariance_t(*at)[0, 0].sqrt().item()
    x_t = (DATA.mean_t(*at) + torch.linspace(-12, 12, 20_001, dtype=torch.float64) * width)[:, None]
    density = DATA.log_density(x_t, *at).exp()
    assert_close(torch.trapezoid(density, x_t[:, 0]).item(), 1.0, rtol=1e-9, atol=0)
    return torch.trapezoid(density * DATA.posterior_covariance(x_t, *at)[:, 0, 0], x_t[:, 0]).item()


def test_pixels_have_the_oracles_denoiser():
    for level in levels(SCHEDULES["cosine"], [0.01, 0.5, 0.99]):
        x_t = torch.linspace(-3, 3, 100, dtype=torch.float64)[:, None]
        at = torch.tensor(level.alpha, dtype=torch.float64), torch.tensor(level.sigma, dtype=torch.float64)
        assert_close(ExactPixels()(x_t, level, None).x_0_hat, DATA.denoise(x_t, *at))


@pytest.mark.parametrize("name", ["cosine", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_measured_variance_of_every_step_is_the_optimal_one_to_a_thousandth(name, images, tmp_path):
    """Of DDPM (eta 1) and DDIM (0), between the levels of the measurement and to 0 (Bao et al. 2022, theorem 1)."""
    schedule = SCHEDULES[name]
    measurement = PosteriorVarianceMeasurement(COUNT, num_levels=3, batch_size=500)
    arguments = schedule, images, Unconditional(), None, torch.device("cpu"), Agreement(), {}
    statistics.write(tmp_path / "statistics", measurement(ExactPixels(), *arguments))
    variance = Analytic(str(tmp_path / "statistics"))
    at = [*levels(schedule, schedule.t_of_log_snr(log_snr_grid(schedule, 3).flip(0)).flip(0)), Level(0.0, 1.0, 0.0)]
    for t, s in pairwise(at):
        assert s.alpha * t.sigma > 10 * t.alpha * s.sigma  # a step so long that beta-tilde is not most of it
        for eta in (0.0, 1.0):
            step = ReverseStep.of(t, s, eta)
            given = step.variance(variance.at(t, s)(None))
            optimal = step.kept + step.of_x_0**2 * truth(t)
            assert given == pytest.approx(optimal, rel=1e-3), (t.t, s.t, eta)


@pytest.mark.parametrize("name", ["cosine", "ve", "rectified_flow", "edm"])
def test_between_its_200_levels_a_measurement_is_as_good(name):
    schedule, grid = SCHEDULES[name], log_snr_grid(SCHEDULES[name], PosteriorVarianceMeasurement().num_levels)
    places = torch.linspace(0, len(grid) - 2, 12).long()
    at = torch.stack([grid[places], grid[places + 1]], 1)
    for pair in at:
        ends = [truth(level) for level in levels(schedule, schedule.t_of_log_snr(pair))]
        known = Statistics(pair, torch.tensor(ends, dtype=torch.float64)[:, None], {})
        middle = levels(schedule, schedule.t_of_log_snr(pair.mean()[None]))[0]
        given = known.at(pair.mean()[None], diagonal=False).item()
        assert given == pytest.approx(truth(middle), rel=1e-3)
