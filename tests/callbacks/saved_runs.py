"""Runs of one process with a checkpoint each step, in this process, and what tests ask of them."""

import csv
from pathlib import Path

import pytest
import tiny
import torch

from diffusion_trainer.apps import rank
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks.run import FIRST, RunCallback
from diffusion_trainer.training import saving
from diffusion_trainer.training.checkpoints import Checkpoint, latest


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def overrides(shards):
    return [
        *shards, *tiny.NETWORK, "network.attention_levels=[]", "strategy=single", "trainer.accelerator=cpu",
        "callbacks.evaluate=null", "callbacks.checkpoint.every_n_images=32", "callbacks.checkpoint.keep=9",
        "callbacks.log={_target_: diffusion_trainer.callbacks.metrics.LogMetrics, every_n_images: 32}",
    ]  # fmt: skip


@pytest.fixture
def run(overrides, tmp_path):
    """run(images, *overrides) -> exit code, in this process; a checkpoint each step of 32 images."""

    def run(images: int, *more: str, folder: Path = tmp_path / "run") -> int:
        config = load("train", [*overrides, f"folder='{folder}'", f"num_images={images}", *more], TrainConfig)
        folder.mkdir(exist_ok=True)
        write_config(folder, config)
        return rank.work(config, folder, World(0, 1, 1, False))

    return run


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def named(*images: int) -> list[str]:
    return [f"images-{n:012d}" for n in images]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = Checkpoint(latest(folder / "checkpoints"))
    return {f"{kind}/{n}": t for kind in found.kinds for n, t in found.whole(kind).items()}


def logged(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [int(row["images_seen"]) for row in csv.DictReader(file)]


def failing(monkeypatch, images: int, times: int) -> list[Path]:
    """The checkpoint of so many images cannot be written so many times; returns what was tried."""
    write, tried = saving.write_tensors, []

    def fail(path, tensors):
        if f"{images:012d}" in path.parent.name:
            tried.append(path)
            if len(tried) <= times:
                raise OSError("No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(saving, "write_tensors", fail)
    return tried


class At64(RunCallback):
    """Does something to a run after its second step."""

    turn = FIRST

    def __init__(self, what):
        self.what = what

    def after_step(self, previous):
        if self.run.images_seen == 64:
            self.what(self.run)
