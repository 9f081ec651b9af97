"""Times of training: of the density they claim, stratified over the global batch, whoever computes them."""

from dataclasses import replace
from math import log

import pytest
import torch
from cases import each
from options import built
from scipy.stats import norm
from torch.testing import assert_close

from diffusion_trainer.process.timesteps import (
    LogitNormal,
    LogNormalSigma,
    LossSecondMoment,
    Stratified,
    Uniform,
    stratified,
)
from diffusion_trainer.training.randomness import LaneDraws

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
TIMESTEPS = built("timesteps")
every_schedule = each("schedule", SCHEDULES)
every_timesteps = each("timesteps", TIMESTEPS)
BATCH, LANES = 32, 4
COSINE = SCHEDULES["cosine"]
every_cut = each("pieces", [1, 2, 4])
every_step = each("step", [0, 1, 7])


def between(low, high):
    """A schedule with this range of t."""
    return replace(SCHEDULES["rectified_flow"], t_min=low, t_max=high)


def draws(first=0, count=BATCH, batch_size=BATCH, lanes=LANES, seed=0):
    return LaneDraws(seed, first, count, batch_size, lanes, torch.device("cpu"))


def cut(step, pieces):
    """The draws of each of the processes that share one global batch."""
    size = BATCH // pieces
    return [draws(step * BATCH + i, size) for i in range(pieces)]


def joined(parts):
    """Values of the pieces in the order of the batch, where they take turns."""
    return torch.stack(parts, 1).flatten(0, 1)


class Edge:
    """The two ends of what a generator may return, at the two ends of the batch."""

    place, total = torch.tensor([0, BATCH - 1]), BATCH

    def uniform(self, stream):
        return torch.tensor([0.0, 1 - 2**-24])


class Midpoints:
    """Each sample in the middle of its stratum: means over the batch are integrals by the midpoint rule."""

    def __init__(self, total):
        self.place, self.total = torch.arange(total), total

    def uniform(self, stream):
        return torch.full((self.total,), 0.5)


def unlike():
    """Second moments that have seen losses from 1 to 5 over the range of COSINE, 20 in each of 20 bins."""
    out = LossSecondMoment(bins=20, history=20)
    t = torch.linspace(*COSINE.t_range, 400)
    out.observe(COSINE, 1 + 4 * t, t)
    return out


@every_timesteps
@every_cut
@every_step
@each("schedule", {name: SCHEDULES[name] for name in ("cosine", "edm")})
def test_times_do_not_depend_on_who_draws_them(timesteps, pieces, step, schedule):
    whole, importance = timesteps(schedule, cut(step, 1)[0])
    parts = [timesteps(schedule, piece) for piece in cut(step, pieces)]
    assert torch.equal(joined([t for t, _ in parts]), whole)
    assert torch.equal(joined([i for _, i in parts]), importance)


@every_schedule
@every_timesteps
def test_times_lie_in_the_range_up_to_its_ends_and_are_a_function_of_the_draws(timesteps, schedule):
    low, high = torch.tensor(schedule.t_range)
    for d in (Edge(), draws(), Midpoints(4096)):
        t, importance = timesteps(schedule, d)
        assert t.shape == importance.shape == d.place.shape
        assert (t.dtype, importance.dtype) == (torch.float32, torch.float32)
        assert ((low <= t) & (t <= high)).all()
        assert (importance.isfinite() & (importance > 0)).all()
        again = timesteps(schedule, d)
        assert torch.equal(again[0], t)
        assert torch.equal(again[1], importance)


@every_timesteps
@pytest.mark.parametrize("t_range", [(0.001, 0.999), (0.2, 0.3), (0.001, 1.0)])
def test_times_lie_in_any_range(timesteps, t_range):
    low, high = torch.tensor(t_range)
    for d in (Edge(), draws()):
        t, _ = timesteps(between(*t_range), d)
        assert ((low <= t) & (t <= high)).all()


def uniform_cdf(timesteps, schedule, t):
    low, high = schedule.t_range
    return (t - low) / (high - low)


def logit_normal_cdf(timesteps, schedule, t):
    ends = (
        norm.cdf(log(end / (1 - end)) if end < 1 else torch.inf, timesteps.mean, timesteps.std)
        for end in schedule.t_range
    )
    first, last = ends
    return (torch.from_numpy(norm.cdf(t.logit(), timesteps.mean, timesteps.std)) - first) / (last - first)


def log_normal_sigma_cdf(timesteps, schedule, t):
    def cdf(t):
        log_sigma = (schedule.sigma(t) / schedule.alpha(t)).log()  # inf without signal
        return torch.from_numpy(norm.cdf(log_sigma, timesteps.mean, timesteps.std))

    first, last = cdf(torch.tensor(schedule.t_range, dtype=torch.float64))
    return (cdf(t) - first) / (last - first)


CDFS = {
    Stratified: uniform_cdf,
    LogitNormal: logit_normal_cdf,
    LogNormalSigma: log_normal_sigma_cdf,
    LossSecondMoment: uniform_cdf,  # before it has seen losses
}


@every_schedule
@each("timesteps", {n: t for n, t in TIMESTEPS.items() if not isinstance(t, Uniform)})
def test_time_is_the_quantile_of_its_share_of_the_density(timesteps, schedule):
    """So one time lies in each stratum of the density, and the times have that density."""
    for d in (draws(), draws(BATCH), Midpoints(512)):
        t, _ = timesteps(schedule, d)
        share = (d.place + d.uniform("timesteps").double()) / d.total
        assert_close(CDFS[type(timesteps)](timesteps, schedule, t.double()), share, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "timesteps", [LogitNormal(1.0, 0.5), LogitNormal(-0.5, 2.0), LogNormalSigma(0.3, 2.0)], ids=str
)
def test_mean_and_spread_move_the_density(timesteps):
    t, _ = timesteps(COSINE, Midpoints(512))
    share = (torch.arange(512) + 0.5) / 512
    assert_close(CDFS[type(timesteps)](timesteps, COSINE, t.double()), share.double(), rtol=0, atol=2e-5)


def test_density_that_lies_within_the_range_has_its_own_mean_and_spread():
    t, _ = LogitNormal(-0.3, 0.7)(between(1e-6, 1 - 1e-6), Midpoints(4096))
    assert_close(t.double().logit().mean().item(), -0.3, rtol=0, atol=1e-3)
    assert_close(t.double().logit().std().item(), 0.7, rtol=0, atol=1e-3)
    edm = SCHEDULES["edm"]
    t, _ = LogNormalSigma()(edm, Midpoints(4096))
    log_sigma = edm.sigma(t.double()).log()  # Karras et al. 2022, table 1: ln sigma ~ N(-1.2, 1.2^2)
    assert_close(log_sigma.mean().item(), -1.2, rtol=0, atol=3e-3)
    assert_close(log_sigma.std().item(), 1.2, rtol=0, atol=3e-3)


@every_cut
@every_step
def test_stratified_has_one_time_in_each_stratum_of_the_global_batch(pieces, step):
    t = joined([Stratified()(between(0.25, 0.75), piece)[0] for piece in cut(step, pieces)])
    stratum = ((t.double() - 0.25) / 0.5 * BATCH).floor()
    assert torch.equal(stratum.sort().values, torch.arange(BATCH, dtype=torch.float64))


def test_stratified_is_uniform_within_each_stratum():
    t = torch.stack([Stratified()(between(0.25, 0.75), draws(step * BATCH))[0] for step in range(400)])
    inside = (t.double() - 0.25) / 0.5 * BATCH - torch.arange(BATCH)
    error = 5 / (12 * inside.numel()) ** 0.5  # five standard errors of the mean of a uniform
    assert abs(inside.mean() - 1 / 2) < error
    assert abs((inside - 1 / 2).square().mean() - 1 / 12) < error / 2


def test_strata_of_large_batches_keep_the_digits_of_their_draws():
    class Large:
        place, total = torch.tensor([2**20 - 1, 2**20 - 1]), 2**20

        def uniform(self, stream):
            return torch.tensor([0.25, 1 - 2**-24])

    share = stratified(Large())
    assert (share < 1).all()
    assert_close(share[0].item(), 1 - 0.75 / 2**20, rtol=0, atol=1e-15)


def test_uniform_times_are_independent_of_their_place():
    t = torch.stack([Uniform()(between(0.25, 0.75), draws(step * BATCH))[0] for step in range(400)])
    assert ((t.mean(0) - 1 / 2).abs() < 5 * 0.5 / (12 * 400) ** 0.5).all()


def test_uniform_times_are_the_uniform_numbers_over_the_range():
    low, high = COSINE.t_range
    t, _ = Uniform()(COSINE, draws())
    assert_close(t, low + (high - low) * draws().uniform("timesteps"), rtol=1e-6, atol=0)


TESTED = {  # with a mean over t that the function's own integral gives
    "constant": (lambda t: torch.ones_like(t), lambda t: t),
    "linear": (lambda t: t, lambda t: t**2 / 2),
    "cubic": (lambda t: t**3, lambda t: t**4 / 4),
    "wave": (lambda t: (5 * t).cos(), lambda t: (5 * t).sin() / 5),
    "steep": (lambda t: (-20 * t).exp(), lambda t: -(-20 * t).exp() / 20),
}
CORRECTED = {
    "stratified": Stratified(),
    "logit_normal": LogitNormal(0.0, 2.0, corrected=True),
    "logit_normal off the middle": LogitNormal(0.7, 2.5, corrected=True),
    "second moment before losses": LossSecondMoment(),
    "second moment": unlike(),
}


@every_schedule
@each("timesteps", CORRECTED)
@each("function", TESTED)
def test_importance_makes_every_mean_that_of_uniform_times(timesteps, schedule, function):
    g, integral = function
    t, importance = timesteps(schedule, Midpoints(2**15))
    low, high = torch.tensor(schedule.t_range, dtype=torch.float64)
    expected = (integral(high) - integral(low)) / (high - low)
    assert_close((importance.double() * g(t.double())).mean(), expected, rtol=0, atol=1e-3)


def test_independent_times_have_the_mean_of_uniform_ones():
    t, importance = Uniform()(COSINE, draws(0, 2**14, 2**14, 8))
    assert (importance == 1).all()
    for power in (1, 2, 3):
        assert_close((t.double() ** power).mean().item(), 1 / (power + 1), rtol=0, atol=5 * 0.3 / 2**7)


def test_without_correction_the_density_stays():
    t, importance = LogitNormal(0.7, 2.0)(COSINE, Midpoints(1024))
    assert (importance == 1).all()
    assert torch.equal(t, LogitNormal(0.7, 2.0, corrected=True)(COSINE, Midpoints(1024))[0])
    assert abs(t.mean() - 0.5) > 0.05


def test_second_moments_draw_often_where_losses_were_large():
    t, importance = unlike()(COSINE, Midpoints(2**12))
    early, late = (t < 0.1).float().mean(), (t > 0.9).float().mean()
    expected = (1 + 4 * 0.95) / (1 + 4 * 0.05)  # Nichol and Dhariwal 2021, eq. 18
    assert_close((late / early).item(), expected, rtol=0.05, atol=0)
    assert importance[t < 0.1].min() > importance[t > 0.9].max()


def test_stratified_has_less_variance_than_independent_times():
    def spread(timesteps):
        return torch.stack([timesteps(COSINE, draws(step * BATCH))[0].mean() for step in range(200)]).var()

    assert spread(Stratified()) < spread(Uniform()) / 100  # 1 / BATCH^2 of it, in theory


def test_times_of_a_learned_schedule_carry_no_gradient():
    learned = built("schedule")["learned"]
    for timesteps in TIMESTEPS.values():
        assert not any(value.requires_grad for value in timesteps(learned, draws()))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("kind", [LogitNormal, LogNormalSigma])
def test_spreads_without_sense_are_refused(kind, std):
    with pytest.raises(ValueError, match="std must be positive"):
        kind(std=std)


@every_cut
@every_step
def test_draws_of_the_pieces_are_the_draws_of_the_whole(pieces, step):
    whole, parts = cut(step, 1)[0], cut(step, pieces)
    assert torch.equal(joined([p.place for p in parts]), torch.arange(BATCH))
    assert torch.equal(joined([p.uniform("a") for p in parts]), whole.uniform("a"))
    assert torch.equal(joined([p.normal("b", (2, 3)) for p in parts]), whole.normal("b", (2, 3)))
    assert {p.total for p in parts} == {BATCH}


def test_draws_are_the_same_again_and_differ_by_seed_stream_step_and_lane():
    u = draws().uniform("a")
    assert torch.equal(u, draws().uniform("a"))
    others = draws(seed=1).uniform("a"), draws().uniform("b"), draws(BATCH).uniform("a"), u.roll(BATCH // LANES)
    assert all((u != other).all() for other in others)


@pytest.mark.parametrize("wrong", [{"first": 1}, {"count": 4}, {"count": 12}, {"lanes": 5}], ids=str)
def test_draws_refuse_parts_of_a_lane(wrong):
    with pytest.raises(ValueError, match=r"whole lanes|no piece"):
        draws(**wrong)
