"""Times of training: unbiased whatever the sampler of t, stratified over the global batch whoever computes it."""

import pytest
import torch
from options import built, each
from torch.testing import assert_close

from diffusion_trainer.process.timesteps import Stratified, Uniform
from diffusion_trainer.training.randomness import LaneDraws

TIMESTEPS = built("timesteps")
every_timesteps = each("timesteps", TIMESTEPS)
BATCH, LANES = 32, 4
RANGE = (0.001, 0.999)
every_cut = pytest.mark.parametrize("pieces", [1, 2, 4])
every_step = pytest.mark.parametrize("step", [0, 1, 7])


def draws(first=0, count=BATCH, batch_size=BATCH, lanes=LANES, seed=0):
    return LaneDraws(seed, first, count, batch_size, lanes, torch.device("cpu"))


def cut(step, pieces):
    """The draws of each of the processes that share one global batch."""
    size = BATCH // pieces
    return [draws(step * BATCH + i * size, size) for i in range(pieces)]


class Edge:
    """The two ends of what a generator may return, at the two ends of the batch."""

    place, total = torch.tensor([0, BATCH - 1]), BATCH

    def uniform(self, stream):
        return torch.tensor([0.0, 1 - 2**-24])


@every_timesteps
@every_cut
@every_step
def test_times_do_not_depend_on_who_draws_them(timesteps, pieces, step):
    whole, importance = timesteps(RANGE, cut(step, 1)[0])
    parts = [timesteps(RANGE, piece) for piece in cut(step, pieces)]
    assert torch.equal(torch.cat([t for t, _ in parts]), whole)
    assert torch.equal(torch.cat([i for _, i in parts]), importance)


@every_cut
@every_step
def test_stratified_has_one_time_in_each_stratum_of_the_global_batch(pieces, step):
    t = torch.cat([Stratified()((0.25, 0.75), piece)[0] for piece in cut(step, pieces)])
    stratum = ((t.double() - 0.25) / 0.5 * BATCH).floor()
    assert torch.equal(stratum.sort().values, torch.arange(BATCH, dtype=torch.float64))


def test_stratified_is_uniform_within_each_stratum():
    t = torch.stack([Stratified()((0.0, 1.0), draws(step * BATCH))[0] for step in range(400)])
    inside = t * BATCH - torch.arange(BATCH)
    error = 5 / (12 * inside.numel()) ** 0.5  # five standard errors of the mean of a uniform
    assert abs(inside.mean() - 1 / 2) < error
    assert abs((inside - 1 / 2).square().mean() - 1 / 12) < error / 2


def test_uniform_times_are_independent_of_their_place():
    t = torch.stack([Uniform()((0.0, 1.0), draws(step * BATCH))[0] for step in range(400)])
    assert ((t.mean(0) - 1 / 2).abs() < 5 / (12 * 400) ** 0.5).all()


@every_timesteps
@pytest.mark.parametrize("t_range", [RANGE, (0.2, 0.3), (0.001, 1.0)])
def test_times_lie_in_the_range_up_to_its_ends(timesteps, t_range):
    for d in (Edge(), draws()):
        t, _ = timesteps(t_range, d)
        low, high = torch.tensor(t_range)
        assert (t >= low).all()
        assert (t <= high).all()


@every_timesteps
def test_importance_makes_every_mean_that_of_uniform_times(timesteps):
    low, high = RANGE
    t, importance = timesteps(RANGE, draws(0, 2**14, 2**14, 8))
    t, importance = t.double(), importance.double()
    for power in (0, 1, 2, 3):
        expected = (high ** (power + 1) - low ** (power + 1)) / (power + 1) / (high - low)
        assert_close((importance * t**power).mean().item(), expected, rtol=0, atol=5 * 0.3 / 2**7)


def test_stratified_has_less_variance_than_independent_times():
    def spread(timesteps):
        return torch.stack([timesteps(RANGE, draws(step * BATCH))[0].mean() for step in range(200)]).var()

    assert spread(Stratified()) < spread(Uniform()) / 100  # 1 / BATCH^2 of it, in theory


@every_cut
@every_step
def test_draws_of_the_pieces_are_the_draws_of_the_whole(pieces, step):
    whole, parts = cut(step, 1)[0], cut(step, pieces)
    assert torch.equal(torch.cat([p.place for p in parts]), torch.arange(BATCH))
    assert torch.equal(torch.cat([p.uniform("a") for p in parts]), whole.uniform("a"))
    assert torch.equal(torch.cat([p.normal("b", (2, 3)) for p in parts]), whole.normal("b", (2, 3)))
    assert {p.total for p in parts} == {BATCH}


def test_draws_are_the_same_again_and_differ_by_seed_stream_step_and_lane():
    u = draws().uniform("a")
    assert torch.equal(u, draws().uniform("a"))
    others = draws(seed=1).uniform("a"), draws().uniform("b"), draws(BATCH).uniform("a"), u.roll(BATCH // LANES)
    assert all((u != other).all() for other in others)


@pytest.mark.parametrize("wrong", [{"first": 4}, {"count": 12}, {"lanes": 5}], ids=str)
def test_draws_refuse_parts_of_a_lane(wrong):
    with pytest.raises(ValueError, match="whole lanes"):
        draws(**wrong)
