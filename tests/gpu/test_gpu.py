"""Training and sampling on a CUDA device. Each test runs on the CPU as well, which shows that the test itself works."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_trainer.apps import finished, rank, train
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import TrainConfig, generator_of
from diffusion_trainer.apps.processes import World
from diffusion_trainer.apps.sample import SampleConfig
from diffusion_trainer.evaluation import pictures
from diffusion_trainer.sampling.noise import SampleNoise
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.training.module import DiffusionModule, to_pixels

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")],
)
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
slow_on_cpu = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])


def settings(folder: Path, device: str, *more: str) -> list[str]:
    """Overrides of a run in <folder>/run that logs every step."""
    return [
        *tiny.overrides(folder), f"trainer.accelerator={device}", f"folder='{folder}/run'", "strategy=single",
        "callbacks.log.every_n_images=32", "optimizer.lr_schedule.warmup_images=0", *more,
    ]  # fmt: skip


def train_here(overrides: list[str]) -> Path:
    """Trains in this process; the run's folder."""
    config = load("train", overrides, TrainConfig)
    folder = Path(config["folder"])
    folder.mkdir()
    write_config(folder, config)
    assert rank.work(config, folder, World(0, 1, 1, False)) == 0
    return folder


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file)]


@slow_on_cpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_lowers_the_loss(tmp_path, device, precision):
    more = [f"precision={precision}", "num_images=1280", "callbacks.checkpoint=null", "callbacks.evaluate=null"]
    more += [*tiny.NETWORK, "optimizer.lr=0.005"] if precision == "fp16" else []  # CPUs are slow in it
    seen = losses(train_here(settings(tmp_path, device, *more)))
    assert len(seen) == 40
    assert np.mean(seen[-10:]) < 0.6 * np.mean(seen[:3])


@pytest.mark.slow
@on_each_device
def test_zero_on_one_device_trains_saves_and_resumes(tmp_path, device, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The rate does not depend on num_images, so half of the run twice is the whole.
    more = [*tiny.NETWORK, "precision=fp32", "trainer.processes=1", "optimizer=adamw", "optimizer.lr=0.01",
            "callbacks.evaluate=null"]  # fmt: skip
    whole = train_here(settings(tmp_path, device, *more, "num_images=512"))
    halves = [*settings(tmp_path, device, *more), "strategy=zero2", f"folder='{tmp_path}/zero2'"]
    assert train.main([*halves, "num_images=256"]) == 0
    assert [p.name for p in (tmp_path / "zero2" / "checkpoints").glob("images-*")] == ["images-000000000256"]
    assert train.main([*halves, "num_images=512"]) == 0
    assert len(losses(whole)) == 16
    assert losses(tmp_path / "zero2") == pytest.approx(losses(whole), rel=1e-3 if device == "cpu" else 1e-2)


@slow_on_cpu
def test_samples_are_those_of_the_cpu(tmp_path, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # A constant rate and a long half-life: the averages are far from the weights.
    more = [*tiny.NETWORK, "precision=fp32", "num_images=960", "optimizer=adamw", "optimizer.lr=0.002",
            "ema.ramp_up_ratio=1.0", "sampler.num_steps=10", "callbacks.evaluate.at_start=false"]  # fmt: skip
    folder = train_here(settings(tmp_path, device, *more))
    here, there = (draw(folder, where) for where in (device, "cpu"))
    torch.testing.assert_close(here.cpu(), there, atol=1e-3, rtol=0)
    # What the evaluation drew while training, with the EMA in the weights' place.
    shown = np.asarray(Image.open(folder / "samples.png"), np.int16)
    expected = np.asarray(pictures.grid(to_pixels(there), 10, pictures.scale_for(8)), np.int16)
    assert np.abs(shown - expected).max() <= 1


def draw(folder: Path, device: str) -> torch.Tensor:
    """The run's first 80 samples, from the EMA weights of its checkpoint."""
    overrides = [f"checkpoint='{folder}'", f"accelerator={device}", "precision=fp32"]
    model = finished.Finished.of(finished.load("sample", overrides, SampleConfig), seed=0)
    return model.generator.draw(list(range(80)), model.parts.conditioning.examples(80))


@on_each_device
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_no_device(tmp_path, device, precision):
    config = load("train", [*settings(tmp_path, device, f"precision={precision}"), *tiny.NETWORK], TrainConfig)
    module = rank.module_of(config, rank.progress_of(config), device).to(device)
    optimizer, batches = module.configure_optimizers(), on(device, config)
    step(module, optimizer, next(batches))  # the first makes the optimizer's state and chooses kernels
    batch = next(batches)
    with never_waiting(device):
        step(module, optimizer, batch)


def step(module: DiffusionModule, optimizer: torch.optim.Optimizer, batch: dict) -> None:
    module.training_step(batch, 0).backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    if module.loss_scale:
        module.loss_scale.after_step(module.nonfinite.kept)
    optimizer.zero_grad()


def on(device: str, config: dict) -> Iterator[dict]:
    """Batches, moved to the device."""
    for batch in build(config["data"], "data").loader(Layout(config["batch_size"]), 0, config["lanes"], 0, 2):
        yield {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


@contextmanager
def never_waiting(device: str) -> Iterator[None]:
    """Raises where the host waits for results of the device."""
    if device == "cpu":
        with NothingRead():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NothingRead(TorchDispatchMode):
    """On a CPU nothing waits; what would on a GPU are the operators that bring a tensor's values to the host."""

    aten = torch.ops.aten
    readers = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in self.readers, f"{func} reads values of a tensor"
        return func(*args, **(kwargs or {}))


@on_each_device
@pytest.mark.parametrize("sampler", ["ancestral", "heun", "unipc"])
def test_sampling_waits_for_no_device_between_its_first_and_its_last_step(tmp_path, device, sampler):
    """And draws what the CPU draws."""
    overrides = settings(tmp_path, device, *tiny.NETWORK, "precision=fp32", f"sampler={sampler}", "sampler.num_steps=8")
    config, drawn = load("train", overrides, TrainConfig), []
    for where in ("cpu", device):
        module = rank.module_of(config, rank.progress_of(config), where).to(where).eval()
        generator = generator_of(config, module.model, module.objective, torch.device(where), 0)
        labels, first = torch.arange(6).to(where), SampleNoise(0, list(range(6)), generator.shape, generator.device)
        parts = generator.denoiser, generator.schedule, generator.variance
        generator.sampler(*parts, first(), labels, first)  # what is known of each level is looked up once
        noise = SampleNoise(0, list(range(6)), generator.shape, generator.device)
        waiting = never_waiting(where)

        def watch(i: int, x: torch.Tensor, x_0_hat: torch.Tensor, waiting=waiting) -> None:
            if i == 0:
                waiting.__enter__()
            elif i == 7:  # before the one look at the numbers
                waiting.__exit__(None, None, None)

        drawn.append(generator.sampler(*parts, noise(), labels, noise, on_step=watch).cpu())
    torch.testing.assert_close(drawn[1], drawn[0], atol=1e-3, rtol=1e-3)


@on_each_device
def test_a_wait_is_noticed(device):
    x = torch.ones(3, device=device)
    with pytest.raises((AssertionError, RuntimeError)), never_waiting(device):
        x.sum().item()
