"""Importance sampling of t by the losses seen: equation 18, unbiased, the same on every rank and after a restart."""

import json
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from cases import each
from options import built
from torch.testing import assert_close

from diffusion_trainer.callbacks.observing import KEY, Observing
from diffusion_trainer.objectives.base import LossTerms
from diffusion_trainer.objectives.denoising import Denoising
from diffusion_trainer.process.predictions import V
from diffusion_trainer.process.timesteps import LossSecondMoment
from diffusion_trainer.process.weightings import Unit
from diffusion_trainer.training.randomness import LaneDraws

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
COSINE = SCHEDULES["cosine"]
LOW, HIGH = COSINE.t_range
every_schedule = each("schedule", SCHEDULES)


def draws(count=4096, first=0, total=None):
    return LaneDraws(0, first, count, total or count, 1, torch.device("cpu"))


def middles(bins, schedule=COSINE):
    low, high = schedule.t_range
    return low + (high - low) * (torch.arange(bins) + 0.5) / bins


def full(bins=10, history=3, uniform=0.001, seed=0):
    """All bins full, of losses that differ; and the losses, (bins, history)."""
    out = LossSecondMoment(bins, history, uniform)
    losses = (
        torch.rand(bins, history, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, bins + 1)[:, None]
    )
    for k in range(history):
        out.observe(COSINE, losses[:, k], middles(bins))
    return out, losses.double()


def test_times_are_uniform_until_every_bin_is_full():
    timesteps = LossSecondMoment(bins=5, history=2)
    even = torch.full((5,), 0.2, dtype=torch.float64)
    for missing in range(5):
        partly = LossSecondMoment(bins=5, history=2)
        partly.observe(COSINE, torch.arange(1.0, 6), middles(5))
        others = [k for k in range(5) if k != missing]
        partly.observe(COSINE, torch.arange(1.0, 6)[others], middles(5)[others])
        assert_close(partly.shares(), even, rtol=0, atol=0)
        partly.observe(COSINE, torch.ones(1), middles(5)[[missing]])
        assert partly.shares().std() > 0.01
    t, importance = timesteps(COSINE, draws())
    assert (importance == 1).all()
    assert_close(t.mean(), torch.tensor((LOW + HIGH) / 2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("uniform", [0.001, 0.2, 1.0])
def test_shares_are_those_of_the_formula(uniform):
    timesteps, losses = full(uniform=uniform)
    root = losses.square().mean(1).sqrt()
    assert_close(timesteps.shares(), (1 - uniform) * root / root.sum() + uniform / 10, rtol=1e-6, atol=0)


def test_only_the_last_losses_count():
    timesteps, _ = full(bins=4, history=3)
    again, losses = full(bins=4, history=3, seed=5)
    for k in range(3):
        timesteps.observe(COSINE, losses[:, k].float(), middles(4))
    assert torch.equal(timesteps.shares(), again.shares())
    assert timesteps.state() == again.state()


def test_times_fall_into_bins_in_their_shares_and_uniformly_within():
    timesteps, _ = full(bins=10)
    t, importance = timesteps(COSINE, draws(100_000))
    place = (t.double() - LOW) / (HIGH - LOW) * 10
    counts = torch.bincount(place.long().clamp(max=9), minlength=10) / 100_000
    assert_close(counts.double(), timesteps.shares(), rtol=0, atol=1e-4)  # stratified
    for k in range(10):
        within = place[(place >= k) & (place < k + 1)] - k
        assert within.mean().item() == pytest.approx(0.5, abs=5 / (12 * len(within)) ** 0.5)
        inside = importance[(place > k + 1e-3) & (place < k + 1 - 1e-3)].double()
        assert_close(inside, (1 / (10 * timesteps.shares()[k])).expand_as(inside), rtol=1e-6, atol=0)


@every_schedule
@pytest.mark.parametrize(
    "function", [torch.ones_like, lambda t: t, lambda t: (7 * t).sin(), lambda t: (t > 0.93).double()]
)
def test_importance_makes_every_mean_the_uniform_one(schedule, function):
    timesteps, _ = full(bins=20)
    t, importance = timesteps(schedule, draws(200_000))
    low, high = schedule.t_range
    assert (t >= low).all()
    assert (t <= high).all()
    uniform = function(torch.linspace(low, high, 200_001, dtype=torch.float64)).mean()
    assert_close((importance.double() * function(t.double())).mean(), uniform, rtol=0, atol=2e-4)
    assert importance.std() > 0.1


def test_state_goes_through_json_and_gives_the_same_draws_bitwise():
    timesteps, _ = full(bins=20, history=4)
    timesteps.observe(COSINE, torch.tensor([1 / 3, 2 / 3]), middles(20)[[3, 7]])
    again = LossSecondMoment(20, 4)
    again.load_state(json.loads(json.dumps(timesteps.state())))
    for step in range(3):
        d = draws(64, step * 64)
        for ours, theirs in zip(timesteps(COSINE, d), again(COSINE, d), strict=True):
            assert torch.equal(ours, theirs)
    for both in (timesteps, again):
        both.observe(COSINE, torch.tensor([0.7]), middles(20)[[7]])
    assert timesteps.state() == again.state()


def test_a_loaded_state_is_its_own():
    timesteps, _ = full()
    again = LossSecondMoment(10, 3)
    again.load_state(timesteps.state())
    before = timesteps.state()["losses"][0].copy()
    again.observe(COSINE, torch.tensor([9.0]), middles(10)[[0]])
    assert timesteps.state()["losses"][0] == before


def test_without_a_state_it_starts_anew():
    timesteps = LossSecondMoment(3, 1)
    timesteps.load_state({})
    assert_close(timesteps.shares(), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_losses_of_zero_everywhere_are_uniform_and_in_one_bin_keep_its_share():
    timesteps = LossSecondMoment(4, 1, uniform=0.1)
    timesteps.observe(COSINE, torch.zeros(4), middles(4))
    assert_close(timesteps.shares(), torch.full((4,), 0.25, dtype=torch.float64))
    timesteps.observe(COSINE, torch.tensor([0.0, 1.0, 1.0, 2.0]), middles(4))
    assert_close(timesteps.shares(), torch.tensor([0.025, 0.25, 0.25, 0.475], dtype=torch.float64))
    t, importance = timesteps(COSINE, draws())
    assert importance.max().item() == pytest.approx(10)
    assert (t < LOW + (HIGH - LOW) / 4).float().mean().item() == pytest.approx(0.025, abs=1e-3)


@every_schedule
def test_times_at_the_ends_are_seen_in_the_first_and_the_last_bin(schedule):
    timesteps = LossSecondMoment(4, 1)
    ends = torch.tensor(schedule.t_range).float()
    timesteps.observe(schedule, torch.tensor([1.0, 2.0]), ends)
    assert [len(losses) for losses in timesteps.state()["losses"]] == [1, 0, 0, 1]


class Edge:
    place, total = torch.tensor([0, 31]), 32

    def uniform(self, stream):
        return torch.tensor([0.0, 1 - 2**-24])


@every_schedule
def test_draws_at_the_edges_stay_in_the_range(schedule):
    for timesteps in (full()[0], LossSecondMoment(10, 3)):
        t, importance = timesteps(schedule, Edge())
        assert_close(t.double(), torch.tensor(schedule.t_range, dtype=torch.float64), rtol=1e-5, atol=1e-6)
        assert (t >= schedule.t_range[0] - 1e-9).all()
        assert (t <= schedule.t_range[1] + 1e-7).all()
        assert importance.isfinite().all()


BATCH = 16


def batches(steps):
    """Of each step: loss, t and importance of the global batch, (BATCH,) each."""
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.rand(BATCH, generator=g) + 0.1 for _ in range(3)) for _ in range(steps)]


def run_with(world, micro_batches, order=None, state=None, steps=6, skip=0):
    """The state of rank 0's objective after `steps` steps that `world` ranks shared, in `micro_batches` pieces each.

    order: in which the ranks' shares come out of the gathering.
    """
    shared = {}
    ranks = []
    for rank in range(world):
        objective = Denoising(COSINE, V(), LossSecondMoment(3, 40), Unit())
        module = SimpleNamespace(
            objective=objective, images_seen=0, progress=SimpleNamespace(batch_size=BATCH), last_terms=None
        )

        def gather(value, rank=rank):
            shared[rank] = list(value)
            return [shared[r] for r in (order or range(world)) if r in shared] if rank == world - 1 else [value]

        agreement = SimpleNamespace(gather=gather, rank=rank, world=world)
        observing = Observing()
        observing.run = SimpleNamespace(module=module, agreement=agreement, state=dict(state or {}))
        observing.start()
        ranks.append(observing)
    trainer = SimpleNamespace(accumulate_grad_batches=micro_batches)
    for step, (loss, t, importance) in list(enumerate(batches(skip + steps)))[skip:]:
        shared.clear()
        for rank, observing in enumerate(ranks):  # the last rank to gather has all the shares
            for piece in range(micro_batches):
                at, pieces = rank * micro_batches + piece, world * micro_batches
                part = slice(at, None, pieces)
                weighted = (loss * importance)[part]
                module = observing.run.module
                module.last_terms = LossTerms(weighted, weighted, t[part], weighted, importance[part])
                batch = {"first": step * BATCH + at}
                observing.on_train_batch_end(trainer, module, None, batch, step * micro_batches + piece)
    return ranks[-1].run.state


@pytest.mark.parametrize(("world", "micro_batches"), [(1, 2), (2, 1), (2, 4), (4, 1), (4, 2), (1, 16)])
def test_all_layouts_of_ranks_and_accumulation_observe_the_same(world, micro_batches):
    assert run_with(world, micro_batches) == run_with(1, 1)


def test_order_of_the_gathered_shares_makes_no_difference():
    for order in permutations(range(4)):
        assert run_with(4, 2, order) == run_with(1, 1)


def test_observing_is_what_the_timesteps_make_of_the_whole_batch():
    timesteps = LossSecondMoment(3, 40)
    for loss, t, importance in batches(6):
        timesteps.observe(COSINE, loss * importance / importance, t)
    assert run_with(1, 1)[KEY] == timesteps.state()


def test_observing_goes_on_from_a_checkpoint():
    half = json.loads(json.dumps(run_with(2, 1, steps=3)))
    assert run_with(1, 2, state=half, steps=3, skip=3) == run_with(1, 1, steps=6)


def test_what_makes_no_sense_is_refused():
    for settings in ({"bins": 1}, {"history": 0}, {"uniform": 0.0}, {"uniform": 1.5}):
        with pytest.raises(ValueError, match="bins must be at least 2"):
            LossSecondMoment(**settings)
