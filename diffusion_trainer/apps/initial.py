"""Weights that a run starts from: another run's, kept in its own folder, so that it needs the other no longer."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import needed, whole
from diffusion_trainer.training import checkpoints
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint
from diffusion_trainer.training.ema import KEY

FILE = "initial.safetensors"
NOTE = "initial.json"  # whose weights those are
DESCRIBING = ("schedule", "prediction", "conditioning", "network")  # of a configuration: what weights mean


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
    """Copies the weights that the run begins with into its folder, once, and notes which they are."""
    if init_from is None or (run / FILE).is_file():
        return
    found = find(run, init_from)
    if found is None:
        return  # gone, and not needed: `check` has seen to that
    with needed(run / FILE, f"the weights of init_from={init_from}"):
        with whole(run / NOTE) as part:  # first, so that no weights stand there without it
            part.write_text(json.dumps({"checkpoint": found.checkpoint, "digest": digest(found.weights)}) + "\n")
        with whole(run / FILE) as part:
            _save(found.weights, part)


def _save(weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(weights), path)
    except SafetensorError as error:  # its only word for a disk that is full
        raise OSError(str(error)) from error


class Found(NamedTuple):
    checkpoint: str  # the name of its folder, or of the file that `export` wrote of one
    weights: dict[str, Tensor]


def find(run: Path, init_from: str) -> Found | None:
    """The newest weights of init_from; of a run that has trained since, just those that it began with, or None if they
    are gone: with others below it, what it has trained would be another model.
    """
    note, source = _note(run), Path(init_from)
    if note is not None and not source.is_file() and not (source / "manifest.json").is_file():
        source = source / "checkpoints" / note.checkpoint
        if not (source / "manifest.json").is_file():
            return None
    name = source.name if source.is_file() else checkpoint_in(source, "init_from").name
    found = Found(name, of(str(source)))
    return found if note is None or note.digest == digest(found.weights) else None


class Note(NamedTuple):
    checkpoint: str
    digest: str


def _note(run: Path) -> Note | None:
    """Of the weights that a run began with; None while nothing is trained on them (or by a version without notes)."""
    if checkpoints.latest(run / "checkpoints") is None or not (run / NOTE).is_file():
        return None
    return Note(**json.loads((run / NOTE).read_text()))


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values."""
    found = sha256()
    for name, value in sorted(weights.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def of(init_from: str) -> dict[str, Tensor]:
    """The EMA weights of a run or checkpoint, by name: those that it trained and those that it was given; or all those
    of a file that `export` wrote.
    """
    if Path(init_from).is_file():
        try:
            return load_file(init_from)
        except SafetensorError as error:
            raise UserError(f"init_from={init_from} is no run and no whole safetensors file ({error})") from error
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


def check(model: nn.Module, config: Mapping[str, Any], folder: Path) -> str:
    """How many of the model's tensors the run is given, in words; "" without init_from.

    UserError if none is, if they do not fit, or are left alone and mean something else, or if the run has begun with
    others.
    """
    source, note, weights = config["init_from"], _note(folder), read(folder)
    if not source:
        apply(model, weights, source)
        return ""
    frozen = not all(p.requires_grad for p in model.parameters())
    if not weights:
        found = find(folder, source)
        weights = found.weights if found else {}
        if found and frozen:
            _check_meaning(config, source)
    if note and frozen and (not weights or digest(weights) != note.digest):
        raise UserError(
            f"{folder} began with the weights of {note.checkpoint} of init_from={source}, and neither its {FILE} nor "
            "that checkpoint has them any more; on others, what it has trained since would be another model. Put one "
            "of them back, or begin anew under another name=..."
        )
    apply(model, weights, source)
    return _check_share(model, weights, source) if weights else ""


def _check_share(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> str:
    names = [name for name, _ in model.named_parameters()]
    fresh = [name for name in names if name not in weights]
    if len(fresh) == len(names):
        raise UserError(
            f"init_from={source} has none of the {len(names)} tensors of this model (there {next(iter(weights))}, here "
            f"{names[0]}, ...): use the network and conditioning of that run"
        )
    others = f"; the others are fresh ({fresh[0]}, ...)" if fresh else ""
    return f"{len(names) - len(fresh)} of {len(names)} tensors are those of init_from={source}{others}"


def _check_meaning(config: Mapping[str, Any], source: str) -> None:
    """A network that stays as it is must be read on the schedule and as the prediction that it was trained with."""
    if Path(source).is_file():
        with safe_open(source, framework="pt") as file:
            about = file.metadata() or {}
        theirs = {group: json.loads(about[group]) for group in DESCRIBING if group in about}
    else:
        theirs = configuration.read(run_of(checkpoint_in(Path(source), "init_from")) / "config.yaml")
    for group in DESCRIBING:
        there, here = ({**(c.get(group) or {}), "second_head": None} for c in (theirs, config))
        if there != here:
            raise UserError(
                f"init_from={source} was trained with another {group} ({theirs.get(group)}), and this objective "
                f"leaves the network as it is; choose the same {group}=..."
            )
