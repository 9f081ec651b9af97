"""Runs that write down what they computed (spies.Spy)."""

import shutil

import torch
from conftest import SMALL
from forked_runs import train_here

SPY = [
    "experiment=digits", "allowed_targets=[spies]", "+callbacks.spy._target_=spies.Spy", "callbacks.evaluate=null",
    "num_images=128", "optimizer.lr=0.01", "optimizer.weight_decay=0.1", "optimizer.lr_schedule.warmup_images=0",
    "ema=several", "ema.main=half_life", *SMALL,
    "+ema.profiles.half_life._target_=diffusion_trainer.training.ema.HalfLife",
    "+ema.profiles.half_life.half_life_images=64", "+ema.profiles.half_life.ramp_up_ratio=0.5",
    "+ema.profiles.constant._target_=diffusion_trainer.training.ema.ConstantDecay", "+ema.profiles.constant.rate=0.8",
    "+ema.profiles.warm_up._target_=diffusion_trainer.training.ema.WarmUp", "+ema.profiles.warm_up.rate=0.3",
]  # fmt: skip


def spied(folder, name, *overrides, started=0):
    """The report of a spied run in <folder>/runs/<name>."""
    return report_of(train_here(folder, *SPY, f"name={name}", *overrides), started)


def spied_once(folder, name, *overrides):
    """As `spied`, for a run that several tests compare others with: the first of them makes it."""
    run = folder / "runs" / name
    return report_of(run) if (run / "spy-0.pt").is_file() else spied(folder, name, *overrides)


def report_of(run, started=0):
    """What Spy has written in a run's folder."""
    return torch.load(run / f"spy-{started}.pt", weights_only=True)


def largest(a, b, what):
    return max(float((a[what][n] - b[what][n]).abs().max()) for n in a[what])


def bitwise(a, b):
    """Weights, all averages, both moments."""
    return a["all"].keys() == b["all"].keys() and all(torch.equal(a["all"][n], b["all"][n]) for n in a["all"])


def forget_newest(run, images, before):
    """A run's newest checkpoint, of `images`, is gone: the run goes on from the one at `before`."""
    checkpoints = run / "checkpoints"
    (newest,) = checkpoints.glob(f"images-*{images}")
    shutil.rmtree(newest)
    (checkpoints / "latest").write_text(newest.name.replace(str(images), str(before)) + "\n")
