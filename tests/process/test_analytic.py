"""Analytic-DPM: with an exact model's statistics every step has the optimal variance, no fixed one a lower bound."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cases import each
from exact import GAUSSIAN, MIXTURE, ExactDenoiser
from options import built
from oracle import Mixture
from safetensors.torch import save_file
from torch.testing import assert_close

from diffusion_trainer.process.analytic import Analytic, Statistics, read, required
from diffusion_trainer.process.decoders import GaussianDensity
from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.variances import Estimate, FixedLarge, FixedSmall, ReverseStep
from diffusion_trainer.sampling.bound import VariationalBound
from diffusion_trainer.sampling.grids import UniformLogSNR

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
every_schedule = each("schedule", SCHEDULES)
DATA = {"gaussian": GAUSSIAN, "mixture": MIXTURE}
NOTHING = Estimate(torch.zeros(1, 2, dtype=torch.float64))


def truth(data, log_snr, n=2_000):
    """E Var[x_0 | x_t] entry by entry, (K, 2) float64, of x_t = x_0 + exp(-log_snr / 2) eps, which is all that counts.

    Exact for a Gaussian, otherwise the mean over n x_t.
    """
    n = 1 if len(data.weights) == 1 else n
    sigma = (-log_snr.double() / 2).exp().repeat_interleave(n)
    x_t = data.sample_t(len(sigma), torch.ones_like(sigma), sigma, torch.Generator().manual_seed(0))
    covariance = data.posterior_covariance(x_t, torch.ones_like(sigma), sigma)
    return covariance.diagonal(dim1=-2, dim2=-1).unflatten(0, (-1, n)).mean(1)


def grid(schedule, count=200):
    low, high = schedule.t_range
    noisy, clean = schedule.log_snr(torch.tensor([high, low], dtype=torch.float64)).tolist()
    return torch.linspace(max(noisy, -12.0), clean, count, dtype=torch.float64)


def write(path, statistics):
    save_file({"log_snr": statistics.log_snr, "error": statistics.error}, path, {"about": json.dumps(statistics.about)})
    return str(path)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Name of data -> a file with the true numbers, as the measurement writes them, over all schedules' ranges."""
    folder, at = tmp_path_factory.mktemp("statistics"), torch.linspace(-14, 20, 300, dtype=torch.float64)
    return {name: write(folder / name, Statistics(at, truth(data, at), {})) for name, data in DATA.items()}


@pytest.fixture(params=sorted(SCHEDULES))
def schedule(request):
    return SCHEDULES[request.param]


def test_interpolation_is_exact_at_the_levels_and_close_between_them(schedule):
    at = grid(schedule)
    known = Statistics(at, truth(GAUSSIAN, at), {})
    assert_close(known.at(at, diagonal=True), known.error, rtol=1e-12, atol=0)
    assert_close(known.at(at, diagonal=False), known.error.mean(1), rtol=1e-12, atol=0)
    between = (at[1:] + at[:-1]) / 2
    middle = truth(GAUSSIAN, between)
    assert_close(known.at(between, diagonal=True), middle, rtol=1e-3, atol=0)
    assert_close(known.at(between, diagonal=False), middle.mean(1), rtol=1e-3, atol=0)
    coarse = Statistics(at[::50].contiguous(), known.error[::50], {})
    assert (coarse.at(between, False) / middle.mean(1) - 1).abs().max() > 1e-3  # what the lines above can tell


def test_beyond_the_ends_it_is_constant_even_without_any_signal():
    known = Statistics(torch.tensor([-2.0, 0.0, 1.0]).double(), torch.tensor([[3.0], [2.0], [1.0]]).double(), {})
    given = known.at(torch.tensor([-torch.inf, -9.0, 5.0, torch.inf]), diagonal=False)
    assert_close(given, torch.tensor([3.0, 3.0, 1.0, 1.0]).double(), rtol=1e-12, atol=0)


def test_entries_that_never_vary_have_no_variance_and_do_not_spoil_the_others():
    """The border of digits is black in every image: the clipped estimate has no error at all there."""
    error = torch.tensor([[0.0, 0.4], [0.0, 0.2], [0.0, 0.1]], dtype=torch.float64)
    known = Statistics(torch.tensor([-2.0, 0.0, 1.0]).double(), error, {})
    given = known.at(torch.tensor([-5.0, -1.0, 0.5, 1.0, 9.0]), diagonal=True)
    assert given.isfinite().all()
    assert (given[:, 0] <= 1e-12).all()
    assert_close(given[[0, -1], 1], torch.tensor([0.4, 0.1]).double())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@each("name", {name: name for name in DATA})
def test_every_step_has_the_optimal_variance(schedule, statistics, name, eta):
    """Of DDPM (eta 1), DDIM (0) and what lies between, as the oracle knows it (Bao et al. 2022, theorem 1)."""
    low, high = schedule.t_range
    variance = Analytic(statistics[name])
    times = [high, (low + high) / 2, low + 0.1 * (high - low), low]
    for t, s in zip(levels(schedule, times[:-1]), levels(schedule, times[1:]), strict=True):
        step = ReverseStep.of(t, s, eta)
        given = step.variance(variance.at(t, s)(NOTHING))
        generator = torch.Generator().manual_seed(0)
        args = s.alpha, s.sigma, t.alpha, t.sigma
        known = DATA[name].optimal_variance(*args, n=2_000, generator=generator, lambda_squared=step.kept).item()
        if eta == 1:
            generator.manual_seed(0)
            assert known == pytest.approx(
                DATA[name].optimal_variance(*args, n=2_000, generator=generator).item(), rel=1e-9
            )
        assert given == pytest.approx(known, rel=1e-3 if name == "gaussian" else 5e-2)


def test_diagonal_is_the_optimal_variance_of_each_entry(schedule, statistics):
    low, high = schedule.t_range
    t, s = levels(schedule, [(low + high) / 2, low])
    given = Analytic(statistics["gaussian"], diagonal=True).at(t, s)(NOTHING)
    one = Analytic(statistics["gaussian"]).at(t, s)(NOTHING)
    assert given.dtype == torch.float64
    known = truth(GAUSSIAN, torch.tensor([t.log_snr]))[0]
    assert_close(given, known, rtol=1e-3, atol=0)
    assert known.std() > 0.01 * known.mean()
    assert given.mean().item() == pytest.approx(one, rel=1e-3)
    single = Analytic(statistics["gaussian"], diagonal=True).like(torch.zeros(1, 2)).at(t, s)
    assert single(NOTHING) is single(NOTHING)  # moved and cast when the run is planned, not at its steps
    assert_close(single(NOTHING), known.float(), rtol=1e-3, atol=0)


def closed_bound(schedule, variance, num_steps, spread_of):
    """The expected bound in nats, of the exact mean: E|x_0 - x_0_hat|^2 is all that is random in it. Without the prior.

    spread_of: log-SNRs (K,) -> that error, (K, 2).
    """
    at = levels(schedule, UniformLogSNR()(schedule, num_steps))
    spread = spread_of(torch.tensor([max(level.log_snr, -14.0) for level in at[:-1]], dtype=torch.float64))
    steps = [ReverseStep.of(t, s) for t, s in pairwise(at[:-1])]
    given = [step.variance(variance.at(t, s)(NOTHING)) for step, (t, s) in zip(steps, pairwise(at[:-1]), strict=True)]
    reverse = torch.stack([torch.as_tensor(v, dtype=torch.float64).expand(2) for v in given])
    kept, of_x_0 = torch.tensor([(step.kept, step.of_x_0) for step in steps], dtype=torch.float64).T[..., None]
    ratio = kept / reverse
    total = (ratio - 1 - ratio.log() + of_x_0**2 * spread[:-1] / reverse).sum() / 2
    last = torch.as_tensor(variance.at(at[-2], at[-1])(NOTHING), dtype=torch.float64)
    last = last if (last > 0).all() else reverse[-1]  # as VariationalBound takes it
    return (total + ((2 * torch.pi * last).log() + spread[-1] / last).sum() / 2).item()


@each("name", {name: name for name in DATA})
def test_its_bound_is_never_above_that_of_a_fixed_variance_and_the_gap_closes(schedule, statistics, name):
    """At any number of steps. (The mixture's error is here what its statistics say: no sampling error decides.)"""
    analytic, gaps = Analytic(statistics[name]), []

    def spread_of(log_snr):
        return truth(GAUSSIAN, log_snr) if name == "gaussian" else read(statistics[name]).at(log_snr, diagonal=True)

    for num_steps in (2, 4, 10, 50, 200, 400):
        ours = closed_bound(schedule, analytic, num_steps, spread_of)
        theirs = [closed_bound(schedule, fixed, num_steps, spread_of) for fixed in (FixedSmall(), FixedLarge())]
        diagonal = closed_bound(schedule, replace(analytic, diagonal=True), num_steps, spread_of)
        assert ours <= min(theirs) + 1e-4
        assert diagonal <= ours + 1e-4
        gaps.append(min(theirs) - ours)
    assert max(gaps) > 0.01
    assert gaps[-1] < gaps[-2]
    assert gaps[-1] < max(gaps) / 10


def test_bound_that_is_measured_is_the_closed_one():
    """sampling/bound.py, by Monte Carlo: what the test above compares is what users are told."""
    schedule, n = SCHEDULES["cosine"], 4_000
    at = grid(schedule)
    values = Statistics(at, truth(GAUSSIAN, at), {})

    class Known(FixedSmall):
        def at(self, t, s):
            value = values.at(torch.tensor([t.log_snr]), False)[0].item()
            return lambda estimate: value

    x_0 = GAUSSIAN.sample(n, torch.Generator().manual_seed(1))[0]
    generator = torch.Generator().manual_seed(2)
    for num_steps in (4, 10):
        bound = VariationalBound(UniformLogSNR(), num_steps, GaussianDensity(), None)
        terms = bound.terms(ExactDenoiser(GAUSSIAN), schedule, Known(), x_0, None,
                            lambda: torch.randn(n, 2, generator=generator, dtype=torch.float64))  # fmt: skip
        measured = terms.diffusion.sum(1) + terms.decoder
        known = closed_bound(schedule, Known(), num_steps, lambda log_snr: truth(GAUSSIAN, log_snr))
        assert abs(measured.mean() - known) < 5 * measured.std() / n**0.5


def test_files_that_are_none_are_refused_by_name(tmp_path):
    path = tmp_path / "statistics.safetensors"
    with pytest.raises(ValueError, match=r"statistics\.safetensors cannot be read.*diffusion-trainer variance"):
        read(str(path))
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="cannot be read"):
        read(str(path))
    values = {"log_snr": torch.zeros(2, dtype=torch.float64), "error": torch.zeros(2, 1, dtype=torch.float64)}
    for tensors, metadata in (
        (values, None),
        (values, {"other": "{}"}),
        (values, {"about": "no json"}),
        ({"log_snr": values["log_snr"]}, {"about": "{}"}),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match="cannot be read"):
            read(str(path))
    save_file(values | {"error": values["error"] / 0}, path, {"about": "{}"})
    with pytest.raises(ValueError, match=r"statistics\.safetensors has numbers that are not finite"):
        read(str(path))
    save_file(values, path, {"about": '{"weights": "ema"}'})  # a file that was refused may be mended
    assert read(str(path)).about == {"weights": "ema"}


def test_without_a_file_it_says_who_needs_it_and_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"^trajectory needs the variance statistics of the model: run `diff"):
        required(None, "trajectory")
    with pytest.raises(ValueError, match=r"missing\.st is missing"):
        required(str(tmp_path / "missing.st"), "trajectory")
    level = Level(0.5, 0.8, 0.6)
    with pytest.raises(ValueError, match="variance=analytic needs"):
        Analytic().at(level, level)


def test_isotropic_data_has_the_closed_form():
    """sigma^2 c / (alpha^2 c + sigma^2), an independent formula for the oracle's number."""
    data = Mixture.gaussian([0.0, 0.0], 0.3 * torch.eye(2))
    log_snr = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64)
    noise = (-log_snr).exp()
    assert_close(truth(data, log_snr)[:, 0], 0.3 * noise / (0.3 + noise))
