"""The optimal trajectory: the dynamic programme finds what trying everything finds, and it is a grid like any other."""

import json
from itertools import combinations

import pytest
import torch
from configured import SCHEDULES
from exact import ExactDenoiser
from options import built
from oracle import Mixture
from safetensors.torch import save_file
from torch.testing import assert_close

from diffusion_trainer.process.analytic import Analytic, read
from diffusion_trainer.process.decoders import GaussianDensity
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.variances import Estimate, ReverseStep
from diffusion_trainer.sampling.bound import VariationalBound
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.grids import Grid
from diffusion_trainer.sampling.optimal_trajectory import OptimalTrajectory, shortest_path, step_costs
from diffusion_trainer.sampling.sampler import Sampler

N = 9  # times to choose from


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Of data of equal entries, so that one number a level is the whole truth."""
    log_snr = torch.linspace(-14, 16, 400, dtype=torch.float64)
    error = (1 / (1 / 0.3 + log_snr.exp()))[:, None].expand(-1, 2).contiguous()
    path = tmp_path_factory.mktemp("trajectory") / "statistics.safetensors"
    save_file({"log_snr": log_snr, "error": error}, path, {"about": json.dumps({})})
    return str(path)


@pytest.fixture(params=sorted(SCHEDULES))
def schedule(request):
    return SCHEDULES[request.param]


def candidates(schedule, statistics, count=N):
    return OptimalTrajectory(statistics, count)(schedule, count).flip(0)


def costs(schedule, statistics, count=N):
    return step_costs(schedule, candidates(schedule, statistics, count), read(statistics))


def along(cost, path):
    """Of a path, indices in descending order."""
    return sum(cost[s, t].item() for t, s in zip(path[:-1], path[1:], strict=True))


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
                known = (torch.log(2 * torch.pi * torch.tensor(variance)) + 1) / 2
            else:
                step = ReverseStep.of(at[j], at[i])
                reverse = torch.tensor(step.variance(variance), dtype=torch.float64)
                ratio = step.kept / reverse
                known = (ratio - 1 - ratio.log() + step.of_x_0**2 * variance / reverse) / 2
            assert cost[i, j].item() == pytest.approx(known.item(), rel=1e-6, abs=1e-9)
    assert (cost[:, 0] == torch.inf).all()


def test_it_costs_no_more_than_equal_steps_and_less_with_more_steps(schedule, statistics):
    count = 60
    cost, before = costs(schedule, statistics, count), torch.inf
    for num_steps in (2, 3, 5, 10, 20, 30, 60):
        even = torch.linspace(count, 0, num_steps + 1).long().tolist()
        ours = along(cost, shortest_path(cost, num_steps).tolist())
        assert ours <= along(cost, even) + 1e-12
        assert ours < before  # each further step refines the one before
        before = ours


def test_all_steps_are_all_times(schedule, statistics):
    times = OptimalTrajectory(statistics, 20)(schedule, 20)
    assert (times.shape, times.dtype) == ((21,), torch.float64)
    low, high = schedule.t_range
    assert_close(times[:-1].diff(), torch.full((19,), -(high - max(low, high / 20)) / 19).double(), rtol=1e-9, atol=0)
    if low == 1 / 1000 and high == 1:  # the times of a discrete process
        assert_close(OptimalTrajectory(statistics, 1000)(schedule, 1000), torch.arange(1000, -1, -1).double() / 1000)


def test_times_decrease_from_the_noisy_end_to_0_and_none_is_below_what_was_trained(schedule, statistics):
    for count in (50, 3000):  # of the second, equal parts of the whole range would be shorter than t_min
        for num_steps in (1, 2, 5, 50):
            if num_steps > 5 and count > 50:
                continue
            times = OptimalTrajectory(statistics, count)(schedule, num_steps)
            assert (times.shape, times.dtype) == ((num_steps + 1,), torch.float64)
            assert (times[0].item(), times[-1].item()) == (schedule.t_range[1], 0)
            assert (times.diff() < 0).all()
            assert times[-2] >= schedule.t_range[0] * (1 - 1e-9)


class Even(Grid):
    def __init__(self, times):
        self.times = times

    def __call__(self, schedule, num_steps):
        return self.times


def test_bound_that_is_measured_falls_as_the_cost_says(statistics):
    """Between the optimal and the even trajectory, on data of equal entries with the exact mean; the prior is the same."""
    schedule, data, n = SCHEDULES["cosine"], Mixture.gaussian([0.0, 0.0], 0.3 * torch.eye(2)), 4000
    x_0 = data.sample(n, torch.Generator().manual_seed(0))[0]
    cost, measured, said = costs(schedule, statistics, 40), [], []
    for path in (shortest_path(cost, 5), torch.tensor([40, 32, 24, 16, 8, 0])):
        grid = Even(candidates(schedule, statistics, 40)[path])
        generator = torch.Generator().manual_seed(1)
        terms = VariationalBound(grid, 5, GaussianDensity(), None).terms(
            ExactDenoiser(data), schedule, Analytic(statistics), x_0, None,
            lambda g=generator: torch.randn(n, 2, generator=g, dtype=torch.float64),
        )  # fmt: skip
        measured.append((terms.diffusion.sum(1) + terms.decoder) / 2)
        said.append(along(cost, path.tolist()))
    for values, known in zip(measured, said, strict=True):
        assert abs(values.mean() - known) < 5 * values.std() / n**0.5
    assert said[0] < said[1] - 0.1


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
