"""A seed means the same picture whatever the number of steps, for samplers that are maps; not for those that draw."""

import pytest
import torch
from cases import each
from configured import SAMPLERS
from exact import MIXTURE
from options import built
from solving import drawn, unbounded

from diffusion_trainer.sampling.adaptive import DormandPrince

COSINE = built("schedule")["cosine"]
MAPS = {n: s for n, s in SAMPLERS.items() if s.solver.deterministic and not isinstance(s.solver, DormandPrince)}


def change(sampler, few, many):
    """Root mean square of what more steps change, over the standard deviation of the samples."""
    x, y = (drawn(unbounded(sampler, steps), MIXTURE, COSINE, 500)[0] for steps in (few, many))
    return ((x - y).square().mean() / y.var()).sqrt().item()


@each("sampler", MAPS)
def test_a_seed_is_the_same_sample_in_20_and_in_100_steps(sampler):
    assert change(sampler, 20, 100) < 0.25


@pytest.mark.parametrize("name", ["ancestral", "euler_ancestral", "dpmpp_sde_2m"])
def test_it_is_another_one_where_noise_is_drawn_on_the_way(name):
    assert change(SAMPLERS[name], 20, 100) > 0.5


def test_more_steps_change_ever_less():
    sampler = SAMPLERS["ddim"]
    changes = [change(sampler, steps, 2 * steps) for steps in (10, 20, 40, 80)]
    assert torch.tensor(changes).diff().lt(0).all()
