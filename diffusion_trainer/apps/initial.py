"""Weights that a run starts from: another run's, kept in its own folder, so that it needs the other no longer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.conventions import UserError
from diffusion_trainer.training import checkpoints
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint
from diffusion_trainer.training.ema import KEY

FILE = "initial.safetensors"


def checkpoint_in(path: Path, key: str = "checkpoint") -> Path:
    """The checkpoint folder that a path means: itself, or the newest of a run; UserError if there is none."""
    if (path / "manifest.json").is_file():
        return path
    newest = checkpoints.latest(path / "checkpoints")
    if newest is None:
        raise UserError(
            f"{key}={path}: there is no checkpoint; give a run's folder (runs/<name>) or one of its checkpoints"
        )
    return newest


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint, as short as it can be said."""
    run = checkpoint.resolve().parent.parent
    return run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run


def read(run: Path) -> dict[str, Tensor]:
    """The weights that a run started from, by name; none unless it had `init_from`. UserError if they are damaged."""
    path = run / FILE
    try:
        return load_file(path) if path.is_file() else {}
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it, and the run's train command writes it again"
        ) from error


def write(run: Path, init_from: str | None) -> None:
    """Copies the weights of init_from into the run's folder, once."""
    path = run / FILE
    if init_from is not None and not path.is_file():
        part = path.with_name(f".{FILE}.part")
        save_file(of(init_from), part)
        part.replace(path)


def of(init_from: str) -> dict[str, Tensor]:
    """The EMA weights of a run or checkpoint, by name: those that it trained and those that it was given."""
    checkpoint = Checkpoint(checkpoint_in(Path(init_from), "init_from"))
    kind = KEY if KEY in checkpoint.kinds else WEIGHT
    return {**read(run_of(checkpoint.folder)), **checkpoint.whole(kind)}


def apply(model: nn.Module, weights: Mapping[str, Tensor], init_from: str | None) -> None:
    """Fills the parameters that `weights` names; UserError if one has another shape, or one that is not trained has
    no weights.
    """
    for name, p in model.named_parameters():
        if name in weights and weights[name].shape != p.shape:
            raise UserError(
                f"init_from={init_from}: {name} is {tuple(weights[name].shape)} there and {tuple(p.shape)} here; use "
                "the network and conditioning of that run"
            )
        if name in weights and p.device.type != "meta":
            with torch.no_grad():
                p.copy_(weights[name])
        elif name not in weights and not p.requires_grad:
            raise UserError(
                f"{name} is not trained by this objective and has no weights"
                + (f" in init_from={init_from}" if init_from else "; say init_from=runs/<name>, a trained model")
            )


def check(model: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """UserError if the weights that the run starts from do not fit, or are left alone and mean something else."""
    weights, source = read(folder), config["init_from"]
    if source and not weights:
        weights = of(source)
        if not all(p.requires_grad for p in model.parameters()):
            _check_meaning(config, source)
    apply(model, weights, source)


def _check_meaning(config: Mapping[str, Any], source: str) -> None:
    """A network that stays as it is must be read on the schedule and as the prediction that it was trained with."""
    theirs = configuration.read(run_of(checkpoint_in(Path(source), "init_from")) / "config.yaml")
    for group in ("schedule", "prediction", "conditioning", "network"):
        there, here = ({**(c.get(group) or {}), "second_head": None} for c in (theirs, config))
        if there != here:
            raise UserError(
                f"init_from={source} was trained with another {group} ({theirs.get(group)}), and this objective "
                f"leaves the network as it is; choose the same {group}=..."
            )
