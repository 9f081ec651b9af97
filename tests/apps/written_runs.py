"""Finished runs in no time: what a run of one step leaves, written without one."""

from pathlib import Path

import pytest
import tiny
import torch

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps import initial
from diffusion_trainer.apps.parts import Parts, TrainConfig
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoints import Checkpoint, latest, save
from diffusion_trainer.training.ema import KEY, attach_ema
from diffusion_trainer.training.nonfinite import NonFinite
from diffusion_trainer.training.sharding import Replicated


def config_of(shards, *overrides):
    return configuration.load("train", [*shards, *tiny.NETWORK, *overrides], TrainConfig)


def model_of(config, seed=0):
    return Parts.of(config, seed).model(torch.float32)


def write_run(folder, config, seed=1, ema=True, images=32):
    """A run of one step, with a checkpoint of all that it trains: weights, and another set as their average."""
    model = model_of(config, seed)
    initial.write(folder, config["init_from"]) if config["init_from"] else None
    initial.apply(model, initial.read(folder), config["init_from"])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01, fused=True)
    if ema:
        attach_ema(optimizer, {KEY: lambda: 0.5}, NonFinite(optimizer))
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    folders.write_config(folder, config)
    return model, save(folder / "checkpoints", images, Replicated(model, optimizer), {}, Agreement(), 5)


def averages(folder):
    return Checkpoint(latest(folder / "checkpoints")).whole(KEY)


RUNS = {
    "plain": ["guidance=none"],
    "unlabelled": ["conditioning=none", "data.fields.label=null"],
    "few": ["conditioning.num_classes=5"],
    "npr": ["objective=npr", "init_from=runs/plain"],
    "hybrid": ["objective=hybrid", "sampler=heun"],
}


def finished_runs(folder: Path, shards: list[str]) -> Path:
    """The folder, with RUNS in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, more in RUNS.items():
            (folder / "runs" / name).mkdir(parents=True)
            write_run(folder / "runs" / name, config_of(shards, *more, "sampler.num_steps=4"))
    return folder
