"""Learning rates as functions of images seen."""

import pytest
import torch

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


def test_biases_and_norms_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.GroupNorm(3, 3))
    groups = AdamW(lr=1.0, lr_schedule=Constant(), weight_decay=0.3).build(model).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.3, 1), (0.0, 3)]
