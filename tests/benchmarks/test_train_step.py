"""benchmarks/train_step.py counts what it says it counts, and runs."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.parts import Parts, TrainConfig, parameter_shapes
from diffusion_trainer.conventions import UserError
from diffusion_trainer.networks.unet import Attention

SCRIPT = ROOT / "benchmarks" / "train_step.py"


@pytest.fixture(scope="module")
def script():
    """benchmarks/train_step.py, which is no package."""
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(size: int = 6) -> tuple[nn.Module, int]:
    """A network of a convolution and a linear layer on (4, 3, size, size), and the FLOPs of its forward pass."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(5 * 9, 7))
    return net, 2 * 4 * (5 * 9) * (3 * 3 * 3) + 2 * 4 * (5 * 9) * 7


def test_counted_flops_are_the_formula(script):
    net, flops = small()
    assert script.count_flops(lambda: net(torch.zeros(4, 3, 6, 6))) == flops


def test_attention_is_two_products(script):
    q = torch.zeros(2, 3, 5, 8)
    for grad in (False, True):  # other kernels
        q.requires_grad_(grad)
        assert script.count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 3 * 5 * 5 * 8)


def test_training_is_three_forward_passes(script):
    net, flops = small()
    x = torch.zeros(4, 3, 6, 6, requires_grad=True)  # as the input of a layer inside a network does
    assert script.count_flops(lambda: net(x).sum().backward()) == script.TRAINING * flops


def by_hand(parts: Parts, x, c_noise, condition) -> int:
    """FLOPs of a forward pass from the layers' shapes."""
    counts = []

    def products(layer: nn.Module, inputs, out) -> None:
        size = layer.weight[0].numel()  # multiply-adds for each number that comes out
        counts.append(2 * out.numel() * size)

    def attention(layer: Attention, inputs, out) -> None:
        b, c, h, w = out.shape
        counts.append(2 * 2 * b * c * (h * w) ** 2)

    for layer in parts.network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(products)
        elif isinstance(layer, Attention):
            layer.register_forward_hook(attention)
    parts.network(x, c_noise, parts.conditioning(condition))
    return sum(counts)


def test_flops_of_the_digits_network(script):
    config = load("train", ["experiment=digits"], TrainConfig)
    parts = Parts.of(config)
    inputs = torch.zeros(2, 1, 8, 8), torch.zeros(2), parts.conditioning.examples(2)
    forward = script.forward_flops(config)
    assert 2 * forward == by_hand(parts, *inputs)
    # The first layer's input needs no gradient: a little less than three.
    step = script.count_flops(lambda: parts.network(*inputs[:2], parts.conditioning(inputs[2])).sum().backward())
    assert (script.TRAINING - 0.02) * 2 * forward < step < script.TRAINING * 2 * forward


def check_report(report: dict, config: dict, steps: int) -> None:
    rate, seconds = report["images_per_second"], report["seconds_per_step"]
    for values in (rate, seconds):
        assert 0 < values["min"] <= values["lower_quartile"] <= values["median"]
        assert values["median"] <= values["upper_quartile"] <= values["max"]
    assert rate["max"] == pytest.approx(config["batch_size"] / seconds["min"])
    assert 0 < report["data_wait_share"] < 1
    assert 0 < report["ema_share"] < 1
    assert report["achieved_flops_per_second"] == pytest.approx(
        3 * report["forward_flops_per_image"] * config["batch_size"] / seconds["median"]
    )
    assert 0 < report["measured_mfu"] == report["achieved_flops_per_second"] / report["measured_peak_flops_per_second"]
    assert report["datasheet_mfu"] is None or torch.cuda.is_available()
    assert report["parameters"] == sum(shape.numel() for shape in parameter_shapes(config).values())
    assert report["peak_memory_bytes"] > 4 * report["parameters"]
    assert report["steps"] == steps
    assert report["strategy"] == config["strategy"]


def test_a_run_in_this_process(script, tmp_path, capsys):
    overrides = [*tiny.overrides(tmp_path), *tiny.NETWORK, "strategy=single"]
    file = tmp_path / "report.json"
    assert script.main([*overrides, "--steps", "3", "--warmup", "1", "--json", str(file)]) == 0
    report, config = json.loads(file.read_text()), load("train", overrides, TrainConfig)
    check_report(report, config, 3)
    assert (report["processes"], report["warmup"]) == (1, 1)
    assert f"{report['images_per_second']['median']:,.1f}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(0 < torch.cuda.device_count() < 2, reason="one GPU is one process")
def test_a_run_of_two_processes_that_accumulate(tmp_path):
    overrides = [*tiny.overrides(tmp_path), *tiny.NETWORK, "strategy=zero2", "trainer.processes=2",
                 "trainer.accumulate_grad_batches=2"]  # fmt: skip
    code, error = execute(*overrides, "--steps", "3", "--warmup", "1", "--json", str(tmp_path / "report.json"))
    assert code == 0, error
    report, config = json.loads((tmp_path / "report.json").read_text()), load("train", overrides, TrainConfig)
    check_report(report, config, 3)
    assert report["processes"] == 2


@pytest.mark.slow
def test_a_mistake_is_one_line_and_code_two():
    code, error = execute("experiment=digits", "batch_sise=3")
    assert code == 2
    assert error == "error: batch_sise=3: there is no option batch_sise; did you mean batch_size?\n"


@pytest.mark.parametrize("wrong", ["--steps=0", "--warmup=0", "--steps=x", "--stops=3", "--json=/no/such/folder/a"])
def test_flags_are_checked(script, wrong):
    with pytest.raises(UserError, match=wrong.split("=")[0]):
        script.main(["experiment=digits", wrong])


def execute(*arguments: str) -> tuple[int, str]:
    """(exit code, standard error)."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    return done.returncode, done.stderr
