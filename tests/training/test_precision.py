"""float16: gradients that it would lose are kept, a factor of the loss changes none, and it is found by itself."""

import random

import pytest
import tiny
import torch
from torch import nn

from diffusion_trainer.apps import rank
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import TrainConfig, dtype_of
from diffusion_trainer.conditioning.unconditional import Unconditional
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.training.ema import KEY
from diffusion_trainer.training.loss_scale import INITIAL, MAXIMUM, MINIMUM, LossScale
from diffusion_trainer.training.model import Model


class Layers(nn.Module):
    """Linear, convolution and a parameter that autocast does not touch."""

    def __init__(self):
        super().__init__()
        self.conv, self.gain = nn.Conv2d(1, 4, 3, padding=1), nn.Parameter(torch.ones(()))
        self.mix = nn.Linear(4, 1)

    def forward(self, x, c_noise, condition):
        return self.gain * self.mix(torch.tanh(self.conv(x)).movedim(1, -1)).movedim(-1, 1)


def gradients(dtype, scale=None, factor=1.0, passes=1, compiled=False):
    """Of a mean, times `factor`, of squares of the outputs; summed over passes."""
    torch.manual_seed(0)
    model = Model(Layers(), Unconditional(), dtype, compiled=compiled)
    scaled = LossScale(scale) if scale else None
    if scaled:
        scaled.attach(model.parameters())
    for i in range(passes):
        x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(i))
        loss = factor * model(x, torch.zeros(8), None).square().mean()
        (scaled(loss) if scaled else loss).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("factor", [1e-6, 1e-8, 1e-10])
def test_gradients_that_vanish_in_float16_do_not_where_the_loss_is_scaled(factor):
    """Smallest float16: 2^-24 = 6e-8. What reaches the network is some 1e-3 of the factor."""
    exact = gradients(torch.float32, factor=factor)
    lost = gradients(torch.float16, factor=factor)
    assert error(lost, exact) > 0.1  # and all is lost of the smaller ones
    assert error(gradients(torch.float16, 2.0**-10 / factor, factor), exact) < 5e-3
    assert error(gradients(torch.float16, 2.0 ** round(15 - torch.tensor(factor).log2().item()), factor), exact) < 5e-3


@pytest.mark.parametrize("passes", [1, 3])
def test_a_power_of_two_changes_no_bit_and_neither_accumulates(passes):
    one = gradients(torch.float16, 2.0**12, passes=passes)
    for power in (11, 13, 14):
        assert torch.equal(gradients(torch.float16, 2.0**power, passes=passes), one)
    assert error(one, gradients(torch.float32, passes=passes)) < 5e-3


@pytest.mark.slow  # compiles
def test_a_compiled_network_is_scaled_like_an_eager_one():
    exact = gradients(torch.float32, factor=1e-8)
    assert error(gradients(torch.float16, 2.0**36, 1e-8, compiled=True), exact) < 5e-3
    assert error(gradients(torch.float16, None, 1e-8, compiled=True), exact) > 0.1


def test_beyond_its_range_a_gradient_is_not_finite():
    assert not gradients(torch.float16, 2.0**30).isfinite().all()


def reference(history, scale, good, double_after):
    """The rule, in words of Python."""
    for kept in history:
        if not kept:
            scale, good = max(scale / 2, MINIMUM), 0
        elif good + 1 == double_after:
            scale, good = min(2 * scale, MAXIMUM), 0
        else:
            good += 1
        yield scale, good


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("start", [INITIAL, 4.0, MAXIMUM])
def test_the_scale_is_a_function_of_which_steps_were_kept(tensors, start):
    """As numbers of the host (ZeRO, which has waited for them) or tensors; written down and read back in between."""
    draw = random.Random(0)
    history = [0.0] * 5 + [1.0] * 60 + [float(draw.random() < 0.8) for _ in range(300)]
    scale = LossScale(start, double_after=5)
    for i, (kept, expected) in enumerate(zip(history, reference(history, start, 0, 5), strict=True)):
        could = float(scale.scale) > MINIMUM
        scale.after_step(torch.tensor(kept) if tensors else kept)
        assert (float(scale.scale), float(scale.good_steps)) == expected
        assert float(scale.to_blame) == (not kept and could)
        if i % 7 == 0:
            state, scale = scale.state(), LossScale(double_after=5)
            scale.load_state(state)


def test_it_doubles_after_the_steps_that_it_says():
    scale = LossScale()
    scale.load_state({"scale": 8.0, "good_steps": 1998.0})
    scale.after_step(1.0)
    assert scale.state() == {"scale": 8.0, "good_steps": 1999.0}
    scale.after_step(1.0)
    assert scale.state() == {"scale": 16.0, "good_steps": 0.0}


def test_only_float16_scales_and_auto_never_chooses_it():
    assert dtype_of("fp16", "cpu") == dtype_of("fp16", "cuda") == torch.float16
    assert dtype_of("bf16", "cpu") == torch.bfloat16
    assert dtype_of("auto", "cpu") == torch.float32


def training(folder, precision):
    """A module and its optimizer, and a function that takes one step on them with the gradient's norm clipped."""
    more = ["strategy=single", f"precision={precision}", "condition_dropout=0.0", f"folder='{folder}/run'"]
    config = load("train", [*tiny.overrides(folder), *tiny.NETWORK, *more], TrainConfig)
    module = rank.module_of(config, rank.progress_of(config), "cpu")
    optimizer = module.configure_optimizers()
    batch = next(iter(build(config["data"], "data").loader(Layout(32), 0, config["lanes"], 0, 2)))

    def step(norm=1e9):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        found = float(nn.utils.clip_grad_norm_(module.parameters(), norm))
        optimizer.step()
        if module.loss_scale:
            module.loss_scale.after_step(module.nonfinite.kept)
        return found

    return module, optimizer, step


def test_an_overflow_touches_nothing_and_the_scale_falls_until_there_is_none(tmp_path):
    module, optimizer, step = training(tmp_path, "fp16")
    step()
    module.loss_scale.load_state({"scale": 2.0**28, "good_steps": 7.0})
    parameters = list(module.parameters())
    kinds = ("exp_avg", "exp_avg_sq", "step", KEY)
    held = lambda: [*(p.detach() for p in parameters), *(optimizer.state[p][k] for p in parameters for k in kinds)]  # noqa: E731
    before, skipped = [x.clone() for x in held()], 0
    while not (kept := bool(step() < float("inf"))):
        skipped += 1
        assert all(map(torch.equal, held(), before))
        assert module.loss_scale.state() == {"scale": 2.0 ** (28 - skipped), "good_steps": 0.0}
    assert kept
    assert 1 <= skipped <= 12
    assert module.loss_scale.state() == {"scale": 2.0 ** (28 - skipped), "good_steps": 1.0}
    assert not all(map(torch.equal, held(), before))
    assert all(x.isfinite().all() for x in held())


def test_clipping_sees_the_true_gradient(tmp_path):
    norms = {}
    for precision in ("fp32", "fp16", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        module, _, step = training(folder, precision)
        norms[precision] = step(0.1)
        clipped = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()
        assert float(clipped) == pytest.approx(0.1, rel=1e-4)
        assert (module.loss_scale is None) == (precision != "fp16")
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=2e-3)
