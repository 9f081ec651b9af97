"""The optimal trajectory: the dynamic programme finds what trying everything finds, and it is a grid like any other."""

import json
from itertools import combinations, pairwise
from math import log, pi

import numpy as np
import pytest
import torch
from cases import each
from configured import SCHEDULES
from exact import ExactDenoiser
from options import built
from oracle import Mixture
from safetensors.torch import save_file
from torch.testing import assert_close

from diffusion_trainer.evaluation.posterior_variance import costs_of_real_numbers
from diffusion_trainer.process.analytic import Analytic, read
from diffusion_trainer.process.decoders import DiscretizedGaussian, GaussianDensity
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.schedules import Cosine, RectifiedFlow
from diffusion_trainer.process.variances import Estimate, ReverseStep
from diffusion_trainer.sampling.bound import VariationalBound
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.dequantization import centres
from diffusion_trainer.sampling.grids import Grid, UniformTime
from diffusion_trainer.sampling.optimal_trajectory import OptimalTrajectory, shortest_path, step_costs
from diffusion_trainer.sampling.sampler import Sampler

N = 9  # times to choose from
UNEVEN = [1.0, 0.01]
PIXELS = [0.05, 5e-4]  # within [-1, 1], or nearly always


BUMPS = Mixture([0.3, 0.7], [[0.5, 0.4], [-0.5, -0.2]], [[[0.01, 0.0], [0.0, 0.002]], [[0.003, 0.0], [0.0, 0.001]]])


# As images of digits: most pixels are at the ends of the range, whose bins are open.
AT_ENDS = Mixture(
    [0.5, 0.2, 0.3],
    [[-1.0, -1.0], [1.0, -1.0], [0.2, 0.3]],
    [[[1e-5, 0.0], [0.0, 1e-5]], [[1e-5, 0.0], [0.0, 1e-5]], [[0.05, 0.0], [0.0, 0.05]]],
)


def save(path, log_snr, error, decoding=None):
    tensors = {"log_snr": log_snr, "error": error} | ({} if decoding is None else {"decoding": decoding})
    save_file(tensors, path, {"about": json.dumps({})})
    return str(path)


def write(path, variances):
    """Of Gaussian data with these variances of its entries, which is E Var[x_0 | x_t] = 1 / (1 / variance + SNR)."""
    log_snr = torch.linspace(-14, 20, 1000, dtype=torch.float64)
    error = 1 / (1 / torch.tensor(variances, dtype=torch.float64) + log_snr.exp()[:, None])
    return save(path, log_snr, error)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Entries unlike each other: then one variance for all of them costs something, and the times matter."""
    return write(tmp_path_factory.mktemp("trajectory") / "uneven.safetensors", UNEVEN)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return write(tmp_path_factory.mktemp("trajectory") / "pixels.safetensors", PIXELS)


@pytest.fixture(scope="module")
def isotropic(tmp_path_factory):
    return write(tmp_path_factory.mktemp("trajectory") / "isotropic.safetensors", [0.3, 0.3])


@pytest.fixture(params=sorted(SCHEDULES))
def schedule(request):
    return SCHEDULES[request.param]


def candidates(schedule, statistics, count=N):
    return OptimalTrajectory(statistics, count)(schedule, count).flip(0)


def costs(schedule, statistics, count=N):
    return step_costs(schedule, candidates(schedule, statistics, count), read(statistics))


def along(cost, path):
    """Of a path, indices in descending order."""
    return sum(cost[s, t].item() for t, s in pairwise(path))


def test_it_finds_what_trying_all_sub_sequences_finds(schedule, statistics):
    cost = costs(schedule, statistics)
    for num_steps in range(1, N + 1):
        paths = [(N, *reversed(middle), 0) for middle in combinations(range(1, N), num_steps - 1)]
        best = min(along(cost, path) for path in paths)
        assert along(cost, shortest_path(cost, num_steps).tolist()) == pytest.approx(best, rel=1e-12)
        if num_steps < N:
            assert best < max(along(cost, path) for path in paths) or len(paths) == 1


def test_random_costs_too():
    """Costs of no schedule, negative ones among them, upwards forbidden."""
    for seed in range(20):
        cost = torch.randn(7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        cost = torch.where(torch.ones(7, 7).triu(1).bool(), cost, torch.inf)
        for num_steps in range(1, 7):
            best = min(along(cost, (6, *reversed(m), 0)) for m in combinations(range(1, 6), num_steps - 1))
            path = shortest_path(cost, num_steps).tolist()
            assert along(cost, path) == pytest.approx(best, rel=1e-12)
            assert (path[0], path[-1], len(path)) == (6, 0, num_steps + 1)


def cost_of_decoding(variance):
    """The mean of -log mass of a pixel's bin over errors z sqrt(variance), by Gauss and Hermite's quadrature."""
    z, weight = (torch.from_numpy(v)[:, None] for v in np.polynomial.hermite_e.hermegauss(80))
    error = z * variance**0.5
    log_mass = DiscretizedGaussian()(torch.zeros_like(error), error, torch.tensor(variance, dtype=torch.float64))
    return -(log_mass @ weight / weight.sum()).item()


def test_cost_is_the_kl_divergence_of_the_optimal_variance_with_its_decoder(schedule, statistics):
    """From the numbers of each step, as the bound of sampling has them, in nats per dimension."""
    times, cost = candidates(schedule, statistics), costs(schedule, statistics)
    at, nothing = levels(schedule, times), Estimate(torch.zeros(1, 2))
    for j in range(1, N + 1):
        for i in range(N + 1):
            if i >= j:
                assert cost[i, j] == torch.inf
                continue
            variance = Analytic(statistics).at(at[j], at[i])(nothing)
            if i == 0:
                known = torch.tensor(cost_of_decoding(variance))
            else:
                step = ReverseStep.of(at[j], at[i])
                reverse = torch.tensor(step.variance(variance), dtype=torch.float64)
                ratio = step.kept / reverse
                known = (ratio - 1 - ratio.log() + step.of_x_0**2 * variance / reverse) / 2
            assert cost[i, j].item() == pytest.approx(known.item(), rel=1e-5, abs=1e-9)
    assert (cost[:, 0] == torch.inf).all()


def test_it_costs_no_more_than_equal_steps(schedule, statistics):
    count = 60
    cost = costs(schedule, statistics, count)
    for num_steps in (2, 3, 5, 10, 20, 30, 60):
        even = torch.linspace(count, 0, num_steps + 1).long().tolist()
        assert along(cost, shortest_path(cost, num_steps).tolist()) <= along(cost, even) + 1e-12


def test_more_steps_cost_less_until_the_last_is_beside_the_bins(schedule, statistics):
    """Each further step refines the one before. But what x_0_hat knows of x_0 within its bin is paid for in vain."""
    times, cost, before = candidates(schedule, statistics, 60), costs(schedule, statistics, 60), torch.inf
    for num_steps in (2, 3, 5, 10, 20, 30):
        path = shortest_path(cost, num_steps).tolist()
        last = schedule.level_at(times[path[-2]].item())
        if last.sigma < 0.05 * last.alpha:
            break
        ours = along(cost, path)
        assert ours < before
        before = ours
    assert before < torch.inf


def test_all_steps_are_all_times(schedule, statistics):
    times = OptimalTrajectory(statistics, 20)(schedule, 20)
    assert (times.shape, times.dtype) == ((21,), torch.float64)
    low, high = schedule.t_range
    step = torch.tensor((high - max(low, high / 20)) / 19, dtype=torch.float64)
    assert_close(-times[:-1].diff(), step.expand(19), rtol=1e-9, atol=0)
    if high == 1:  # the times of a discrete process
        assert_close(times, torch.arange(20, -1, -1).double() / 20, rtol=1e-12, atol=0)


def test_times_decrease_from_the_noisy_end_to_0_and_none_is_below_what_was_trained(schedule, statistics):
    check_grid(OptimalTrajectory(statistics, 50), schedule, (1, 2, 5, 50))


def test_more_times_than_fit_above_the_clean_end_stay_above_it(statistics):
    schedule = Cosine(t_min=0.2)
    check_grid(OptimalTrajectory(statistics, 20), schedule, (1, 5, 20))
    assert OptimalTrajectory(statistics, 20)(schedule, 20)[-2] == 0.2


def check_grid(grid, schedule, counts):
    for num_steps in counts:
        times = grid(schedule, num_steps)
        assert (times.shape, times.dtype) == ((num_steps + 1,), torch.float64)
        assert (times[0].item(), times[-1].item()) == (schedule.t_range[1], 0)
        assert (times.diff() < 0).all()
        assert times[-2] >= schedule.t_range[0] * (1 - 1e-9)


def test_every_trajectory_of_an_isotropic_gaussian_costs_the_same(schedule, isotropic):
    """Its reverse steps are exactly Gaussian, so the bound is tight in any number of them: H(x_0 | x_T) of pixels.

    Where the last step is beside their bins it is more, never less.
    """
    cost = costs(schedule, isotropic)
    _, alpha, sigma = schedule.at_noisy_end
    entropy = (log(2 * pi / (1 / 0.3 + (alpha / sigma) ** 2)) + 1) / 2 - log(2 / 255)
    for path in ((N, 0), (N, 4, 0), (N, 5, 0), (N, 7, 6, 4, 0), (*range(N, 3, -1), 0)):
        assert along(cost, path) == pytest.approx(entropy, abs=2e-3)
    for path in ((N, 1, 0), (N, 2, 1, 0), tuple(range(N, -1, -1))):
        assert along(cost, path) > entropy - 2e-3


@pytest.mark.parametrize("num_steps", [10, 200])
def test_no_step_is_spent_within_the_bins_of_pixels(num_steps, isotropic):
    """There all that is left to know of x_0 is where it lies within its bin, which costs nothing more."""
    schedule = RectifiedFlow(t_min=1e-4)
    last = schedule.level_at(OptimalTrajectory(isotropic, 1000)(schedule, num_steps)[-2].item())
    assert last.sigma / last.alpha > 4 * (2 / 255)


class Given(Grid):
    def __init__(self, times):
        self.times = times

    def __call__(self, schedule, num_steps):
        return self.times


def pixels_of(data, n, seed):
    """x_0 (n, 2), rounded to the centres of 8-bit pixels."""
    x_0 = data.sample(n, torch.Generator().manual_seed(seed))[0].clamp(-1, 1)
    return centres(((x_0 + 1) * 127.5).round().to(torch.uint8))


def measured(data, schedule, times, statistics, n=4000):
    """The bound of 8-bit pixels, (n,), in nats per dimension and without the prior, which is the same for all."""
    return bound_of(data, schedule, times, statistics, pixels_of(data, n, 0), DiscretizedGaussian())


def bound_of(data, schedule, times, statistics, x_0, decoder):
    generator = torch.Generator().manual_seed(1)
    terms = VariationalBound(Given(times), len(times) - 1, decoder, None).terms(
        ExactDenoiser(data), schedule, Analytic(statistics), x_0, None,
        lambda: torch.randn(x_0.shape, generator=generator, dtype=torch.float64),
    )  # fmt: skip
    return (terms.diffusion.sum(1) + terms.decoder) / 2


def test_bound_that_is_measured_is_the_cost_and_lower_than_that_of_equal_steps(schedule, pixels):
    """Of Gaussian data, with the exact mean; rounding to pixels has made it no other data."""
    data = Mixture.gaussian([0.0, 0.0], torch.diag(torch.tensor(PIXELS)))
    for num_steps in (3, 10):
        bounds, said = [], []
        for grid in (OptimalTrajectory(pixels, 200), UniformTime()):
            times = grid(schedule, num_steps)
            cost = step_costs(schedule, times.flip(0), read(pixels))
            said.append(along(cost, range(num_steps, -1, -1)))
            bounds.append(measured(data, schedule, times, pixels))
        for bound, known in zip(bounds, said, strict=True):
            assert abs(bound.mean() - known) < 5 * bound.std() / len(bound) ** 0.5
        saved, difference = said[1] - said[0], bounds[1] - bounds[0]
        assert saved > 0
        assert difference.mean() > saved / 2


@pytest.fixture(scope="module")
def of_mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectory")
    return {data: measured_statistics(data, folder / f"{i}.safetensors") for i, data in enumerate((BUMPS, AT_ENDS))}


def measured_statistics(data, path):
    """As `diffusion-trainer variance` measures them."""
    log_snr, x_0, error, decoding = torch.linspace(-14, 14, 60, dtype=torch.float64), pixels_of(data, 4000, 1), [], []
    generator = torch.Generator().manual_seed(2)
    for alpha, sigma in zip(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt(), strict=True):
        noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
        x_0_hat = data.denoise(alpha * x_0 + sigma * noise, alpha, sigma)
        error.append((x_0_hat - x_0).square().mean(0))
        decoding.append(-DiscretizedGaussian()(x_0, x_0_hat, error[-1].mean()).mean() / 2)
    return save(path, log_snr, torch.stack(error), torch.stack(decoding))


@pytest.mark.parametrize("name", ["cosine", "rectified_flow", "linear", "ve"])
@pytest.mark.parametrize("num_steps", [3, 10])
@each("data", {"bumps": BUMPS, "at_ends": AT_ENDS})
def test_bound_of_a_mixture_is_no_higher_than_that_of_equal_steps(data, name, num_steps, of_mixture):
    """Its errors are not normal, and open bins at the two ends of the range cost less than any others."""
    schedule, statistics = SCHEDULES[name], of_mixture[data]
    grids = OptimalTrajectory(statistics, 300), UniformTime()
    ours, even = (measured(data, schedule, grid(schedule, num_steps), statistics) for grid in grids)
    error = (even - ours).std() / len(ours) ** 0.5
    assert (even - ours).mean() > (3 * error if data is BUMPS else -2 * error)


def test_decoding_costs_what_was_measured(of_mixture):
    statistics = read(of_mixture[AT_ENDS])
    assert_close(statistics.cost_of_decoding(statistics.log_snr), statistics.decoding, rtol=1e-12, atol=0)
    normal = statistics._replace(decoding=None).cost_of_decoding(statistics.log_snr)
    assert (normal - statistics.decoding).max() > 2  # nats


def of_real_numbers(path, log_snr, error):
    """As `diffusion-trainer variance` writes statistics of latents."""
    return save(path, log_snr, error, costs_of_real_numbers(error.mean(1)))


def test_every_trajectory_of_real_numbers_costs_an_isotropic_gaussian_its_entropy(schedule, tmp_path):
    """H(x_0 | x_T), however close to the data the last step is: there are no bins."""
    log_snr = torch.linspace(-14, 20, 1000, dtype=torch.float64)
    error = 1 / (1 / 0.3 + log_snr.exp()[:, None].expand(-1, 2))
    cost = costs(schedule, of_real_numbers(tmp_path / "real.safetensors", log_snr, error))
    _, alpha, sigma = schedule.at_noisy_end
    entropy = (log(2 * pi / (1 / 0.3 + (alpha / sigma) ** 2)) + 1) / 2
    for path in ((N, 0), (N, 4, 0), (N, 1, 0), (N, 2, 1, 0), tuple(range(N, -1, -1))):
        assert along(cost, path) == pytest.approx(entropy, abs=1e-3)


LATENTS = Mixture([0.3, 0.7], [[2.0, 1.5], [-2.0, -1.0]], [[[0.2, 0.0], [0.0, 0.05]], [[0.05, 0.0], [0.0, 0.02]]])


@pytest.mark.parametrize("name", ["cosine", "rectified_flow", "linear", "ve"])
def test_bound_of_real_numbers_is_the_cost_and_no_higher_than_that_of_equal_steps(name, tmp_path):
    """Of a mixture beyond [-1, 1], where pixels would be in open bins, with its exact mean."""
    schedule, x_0 = SCHEDULES[name], LATENTS.sample(4000, torch.Generator().manual_seed(0))[0]
    log_snr, generator, error = torch.linspace(-14, 14, 60, dtype=torch.float64), torch.Generator().manual_seed(2), []
    for alpha, sigma in zip(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt(), strict=True):
        noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
        error.append((LATENTS.denoise(alpha * x_0 + sigma * noise, alpha, sigma) - x_0).square().mean(0))
    statistics = of_real_numbers(tmp_path / "latents.safetensors", log_snr, torch.stack(error))
    ours, even = (grid(schedule, 4) for grid in (OptimalTrajectory(statistics, 300), UniformTime()))
    bounds = [bound_of(LATENTS, schedule, times, statistics, x_0, GaussianDensity()) for times in (ours, even)]
    for times, bound in zip((ours, even), bounds, strict=True):
        said = along(step_costs(schedule, times.flip(0), read(statistics)), range(4, -1, -1))
        assert abs(bound.mean() - said) < 5 * bound.std() / len(bound) ** 0.5
    difference = bounds[1] - bounds[0]
    assert difference.mean() > 3 * difference.std() / len(difference) ** 0.5


def test_it_is_refused_without_statistics_and_with_more_steps_than_times(statistics, tmp_path):
    cosine = SCHEDULES["cosine"]
    with pytest.raises(ValueError, match="OptimalTrajectory needs the variance statistics"):
        OptimalTrajectory()(cosine, 5)
    with pytest.raises(ValueError, match=r"none\.st is missing"):
        OptimalTrajectory(str(tmp_path / "none.st"))(cosine, 5)
    with pytest.raises(ValueError, match="num_steps=11 is more than the 10 times"):
        OptimalTrajectory(statistics, 10)(cosine, 11)
    with pytest.raises(ValueError, match="num_timesteps must be at least 2"):
        OptimalTrajectory(statistics, 1)


def test_conf_walks_it_in_ancestral_steps(statistics):
    sampler = built("sampler")["optimal_trajectory"]
    assert sampler == Sampler(DDIM(eta=1.0), OptimalTrajectory(None, 1000), 50, 1.0)
