"""What is measured of an exact denoiser is what theory says, whoever measures it in whatever batches."""

import io
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from cases import each
from options import built
from oracle import Mixture
from torch.distributions import Normal
from torch.testing import assert_close

from diffusion_trainer.conditioning.class_label import ClassLabel
from diffusion_trainer.conditioning.unconditional import Unconditional
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.posterior_variance import (
    MIN_LOG_SNR,
    PosteriorVarianceMeasurement,
    estimates,
    log_snr_grid,
    squared_errors,
)
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.variances import Estimate
from diffusion_trainer.sampling.noise import SampleNoise
from diffusion_trainer.streaming.arrays import Latent
from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.streaming.writer import write_shards
from diffusion_trainer.training.agreement import Agreement

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
CPU, SHAPE = torch.device("cpu"), (1, 40, 40)
# Of 1,600 independent entries: the mean over entries and 4,000 samples has a relative standard error of
# sqrt(2 / (1,600 * 4,000)) = 5.6e-4 where all vary alike, and for this spectrum up to 7e-4: 2e-3 is three of them.
VARIANCES = torch.linspace(0.05, 0.5, 1600, dtype=torch.float64).reshape(SHAPE)


@dataclass(frozen=True)
class Diagonal(Denoiser):
    """E[x_0 | x_t] for x_0 ~ N(0, diag(variances)), entry by entry; `factor` makes it wrong."""

    variances: torch.Tensor
    factor: float = 1.0

    def __call__(self, x_t, level, condition):
        gain = level.alpha * self.variances / (level.alpha**2 * self.variances + level.sigma**2)
        return Estimate(self.factor * gain.to(x_t) * x_t)

    def null(self, condition):
        return condition


def exact(level):
    return VARIANCES * level.sigma**2 / (level.alpha**2 * VARIANCES + level.sigma**2)


def measured(denoiser, at, count, bound=None, size=2000):
    total, generator = 0, torch.Generator().manual_seed(7)
    for _ in range(count // size):
        x_0 = torch.randn(size, *SHAPE, generator=generator) * VARIANCES.sqrt().float()
        noise = lambda n=size, g=generator: torch.randn(n, *SHAPE, generator=g)  # noqa: E731
        total = total + squared_errors(x_0, estimates(denoiser, at, x_0, None, noise, bound))
    return total / count


@pytest.mark.parametrize("name", ["cosine"])
def test_exact_denoiser_of_a_gaussian_has_the_oracles_posterior_variance(name):
    schedule = SCHEDULES[name]
    at = levels(schedule, schedule.t_of_log_snr(torch.tensor([-6.0, -1.0, 2.0, 8.0], dtype=torch.float64)))
    given = measured(Diagonal(VARIANCES), at, 4_000)
    flat = Mixture.gaussian(torch.zeros(1600), torch.diag(VARIANCES.flatten()))
    for k, level in enumerate(at):
        nothing = torch.zeros(1, 1600, dtype=torch.float64)
        noise_level = (torch.tensor(v, dtype=torch.float64) for v in (level.alpha, level.sigma))
        oracle = flat.posterior_covariance(nothing, *noise_level)[0].diagonal()
        assert_close(given[k].mean(), oracle.mean(), rtol=2e-3, atol=0)  # isotropic
        assert_close(given[k].flatten(), oracle, rtol=6 * (2 / 4_000) ** 0.5, atol=0)  # each entry


def test_wrong_denoiser_has_its_square_as_well():
    """The optimal variance for the mean as it is (Bao et al. 2022b, theorem 3)."""
    at = levels(SCHEDULES["cosine"], [0.5])
    given = measured(Diagonal(VARIANCES, -0.5), at, 4_000)[0]
    gain = at[0].alpha * VARIANCES / (at[0].alpha ** 2 * VARIANCES + at[0].sigma ** 2)
    off = (1.5 * gain) ** 2 * (at[0].alpha ** 2 * VARIANCES + at[0].sigma ** 2)
    assert given.mean().item() == pytest.approx((exact(at[0]) + off).mean().item(), rel=1e-2)
    assert off.mean() > 0.1 * exact(at[0]).mean()


def test_estimates_are_clipped_as_in_sampling():
    at = levels(SCHEDULES["cosine"], [0.5])
    x_0 = torch.full((4, *SHAPE), 0.25)
    far = lambda x, level, condition: Estimate(torch.full_like(x, 9.0))  # noqa: E731
    for bound, error in ((1.0, 0.75**2), (2.0, 1.75**2), (None, 8.75**2)):
        given = squared_errors(x_0, estimates(far, at, x_0, None, lambda: torch.zeros(4, *SHAPE), bound))
        assert_close(given, torch.full((1, *SHAPE), 4 * error, dtype=torch.float64))


@each("schedule", SCHEDULES)
def test_grid_covers_the_range_as_far_as_it_is_finite(schedule):
    grid = log_snr_grid(schedule, 50)
    low, high = schedule.t_range
    noisy, clean = schedule.log_snr(torch.tensor([high, low], dtype=torch.float64)).tolist()
    assert (grid.shape, grid.dtype) == ((50,), torch.float64)
    assert (grid.diff() > 0).all()
    assert grid[-1].item() == pytest.approx(clean)
    assert grid[0].item() == pytest.approx(max(noisy, MIN_LOG_SNR))
    times = schedule.t_of_log_snr(grid)
    assert ((times >= low * (1 - 1e-9)) & (times <= high * (1 + 1e-9))).all()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.overrides(folder)
    return tiny.data(folder)


@dataclass(frozen=True)
class ByLabel(Denoiser):
    """Depends on x_t, the level and the condition, so that a mistaken one is seen."""

    def __call__(self, x_t, level, condition):
        return Estimate(0.5 * x_t + level.alpha * (condition.float() / 10 - 0.5)[:, None, None, None])

    def null(self, condition):
        return condition


def measure(data, ranks=1, denoiser=None, conditioning=None, bound=1.0, **settings):
    """The statistics that all ranks get, one after the other: each gathering sums what the others have given.

    There are two (of latents one), and what is given to the second depends on the first: so each rank does all of it
    three times.
    """
    settings = {"num_samples": 130, "num_levels": 4, "batch_size": 32, **settings}
    shares, known = [[], []], []  # of each gathering; those that are complete
    arguments = (denoiser or ByLabel(), SCHEDULES["cosine"], data, conditioning or ClassLabel(10, 4), bound, CPU)

    def gather(count, value):
        i = next(count)
        if i < len(known):
            return list(known[i])
        if i == len(known):
            shares[i].append(value)
        return [value]

    for _ in range(3):
        results = []
        for rank in range(ranks):
            agreement = SimpleNamespace(rank=rank, world=ranks, gather=partial(gather, count()))
            results.append(PosteriorVarianceMeasurement(**settings)(*arguments, agreement, {"who": "me"}))
        known = shares[: len(known) + 1]
    for result in results:
        assert torch.equal(result.error, results[0].error)
        assert torch.equal(result.decoding, results[0].decoding)
    return results[0]


def test_measurement_is_the_mean_over_images_and_their_own_noise(data):
    """By hand: sample i is image i modulo their number, with noise i; another noise at each level."""
    given = measure(data)
    at = levels(SCHEDULES["cosine"], SCHEDULES["cosine"].t_of_log_snr(given.log_snr))
    total, cost = torch.zeros(4, 1, 8, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for i in range(130):
        sample = data.batch([i % 100])
        x_0 = sample["image"].float() / 127.5 - 1
        noise = SampleNoise(0, [i], (1, 8, 8), CPU)
        for k, level in enumerate(at):
            x_t = level.alpha * x_0 + level.sigma * noise()
            x_0_hat = ByLabel()(x_t, level, sample["label"]).x_0_hat.clamp(-1, 1)
            total[k] += (x_0_hat - x_0).double().square()[0]
            normal = Normal(x_0_hat.double(), given.error[k].mean().sqrt())
            low, high = normal.cdf(x_0.double() - 1 / 255), normal.cdf(x_0.double() + 1 / 255)
            low, high = torch.where(x_0 < -0.999, 0, low), torch.where(x_0 > 0.999, 1, high)
            cost[k] -= (high - low).log().mean()
    assert_close(given.error, total / 130, rtol=1e-6, atol=1e-9)
    assert_close(given.decoding, cost / 130, rtol=1e-6, atol=0)
    assert given.about == {"who": "me"}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """(2, 4, 4) float16, of deviation 2: most are beyond [-1, 1], where bins of pixels would be open."""
    folder, numbers = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)

    def sample(i):
        file = io.BytesIO()
        np.save(file, 2 * numbers.standard_normal((2, 4, 4)).astype(np.float16))
        return {"__key__": f"{i:03d}", "latent.npy": file.getvalue()}

    write_shards(map(sample, range(100)), folder, "train", 60)
    return ShardData({"image": Latent(2, 4, 4)}, f"{folder}/train-*.tar")


class Counted(Denoiser):
    """Shrinks x_t; counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x_t, level, condition):
        self.calls += 1
        return Estimate(0.5 * x_t)

    def null(self, condition):
        return condition


@pytest.mark.parametrize("ranks", [1, 3])
def test_decoding_of_latents_costs_the_mean_of_their_negative_log_density(latents, ranks):
    """By hand: a normal around x_0_hat with the mean error as its variance, at latents as they are."""
    given = measure(latents, ranks, denoiser=Counted(), conditioning=Unconditional(), bound=None)
    at = levels(SCHEDULES["cosine"], SCHEDULES["cosine"].t_of_log_snr(given.log_snr))
    total, cost = torch.zeros(4, 2, 4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for i in range(130):
        x_0, noise = latents.batch([i % 100])["image"].float(), SampleNoise(0, [i], (2, 4, 4), CPU)
        for k, level in enumerate(at):
            x_0_hat = 0.5 * (level.alpha * x_0 + level.sigma * noise())
            total[k] += (x_0_hat - x_0).double().square()[0]
            cost[k] -= Normal(x_0_hat.double(), given.error[k].mean().sqrt()).log_prob(x_0.double()).mean()
    assert_close(given.error, total / 130, rtol=1e-6, atol=0)
    assert_close(given.decoding, cost / 130, rtol=1e-6, atol=0)


def test_latents_are_estimated_once_and_pixels_twice(latents, data):
    arguments = (Unconditional(), None, CPU, Agreement(), {})
    for images, passes in ((latents, 1), (data, 2)):
        denoiser = Counted()
        PosteriorVarianceMeasurement(64, 4, 32)(denoiser, SCHEDULES["cosine"], images, *arguments)
        assert denoiser.calls == passes * 2 * 4


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 1), (1, 130), (1, 1000), (2, 32), (3, 7), (140, 4)])
def test_measurement_does_not_depend_on_ranks_and_batches(data, ranks, batch_size):
    given, known = measure(data, ranks, batch_size=batch_size), measure(data)
    assert_close(given.error, known.error, rtol=1e-6, atol=1e-12)
    assert_close(given.decoding, known.decoding, rtol=1e-6, atol=1e-12)


def test_another_seed_is_another_measurement(data):
    assert not torch.equal(measure(data, seed=1).error, measure(data).error)


def test_without_labels_it_measures_too_and_a_wrong_label_is_refused(data):
    plain = lambda x, level, condition: Estimate(0.5 * x if condition is None else x)  # noqa: E731
    assert measure(data, denoiser=plain, conditioning=Unconditional()).error.isfinite().all()
    with pytest.raises(UserError, match="label 5 is out of range"):
        measure(data, conditioning=ClassLabel(5, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("bound", [1.0, None])
def test_a_network_whose_estimates_are_not_finite_is_not_measured(data, bad, bound):
    broken = lambda x, level, condition: Estimate(torch.where(x > 2, bad, x))  # noqa: E731
    with pytest.raises(UserError, match=r"returns inf or NaN at [1-4] of 4 noise levels"):
        measure(data, denoiser=broken, bound=bound)


@pytest.mark.parametrize("settings", [{"num_samples": 1}, {"num_levels": 1}, {"batch_size": 0}])
def test_what_makes_no_sense_is_refused(settings):
    with pytest.raises(ValueError, match="at least 2"):
        PosteriorVarianceMeasurement(**settings)
