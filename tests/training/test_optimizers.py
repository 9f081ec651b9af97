"""Learning rates and EMA profiles as functions of images seen, and the EMA's closed form."""

import pytest
import torch

from diffusion_trainer.training.ema import KEY, ConstantDecay, HalfLife, attach_ema
from diffusion_trainer.training.optimizers import AdamW, Constant, CosineDecay


def test_cosine_decay_warms_up_then_falls_to_its_end():
    rate = CosineDecay(warmup_images=100, final=0.1)
    assert rate(0, 1100) == 0
    assert rate(50, 1100) == 0.5
    assert rate(100, 1100) == 1
    assert rate(600, 1100) == pytest.approx(0.55)
    assert rate(1100, 1100) == pytest.approx(0.1)
    assert rate(5000, 1100) == pytest.approx(0.1)
    assert Constant(0)(0, 10) == 1


def test_weights_of_a_half_life_ago_count_half():
    profile = HalfLife(half_life_images=1000, ramp_up_ratio=1e9)
    kept = 1.0
    for step in range(10):
        kept *= profile.decay(100 * step, 100)
    assert kept == pytest.approx(0.5)
    early = HalfLife(half_life_images=1000, ramp_up_ratio=0.1)
    assert early.decay(0, 100) == pytest.approx(0.5 ** (100 / 10))
    assert early.decay(10**9, 100) == pytest.approx(0.5 ** (100 / 1000))


def test_the_average_is_its_closed_form_from_the_initial_weights_on():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    profile = ConstantDecay(0.8)
    attach_ema(optimizer, lambda: profile.decay(0, 1))
    history = [model.weight.detach().clone()]
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(3, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        history.append(model.weight.detach().clone())
    closed = 0.8**6 * history[0] + sum(0.2 * 0.8 ** (6 - k) * history[k] for k in range(1, 7))
    assert torch.allclose(optimizer.state[model.weight][KEY], closed, rtol=1e-12, atol=1e-14)


def test_biases_and_norms_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.GroupNorm(3, 3))
    groups = AdamW(lr=1.0, lr_schedule=Constant(), weight_decay=0.3).build(model).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.3, 1), (0.0, 3)]
