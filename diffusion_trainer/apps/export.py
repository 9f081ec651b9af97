"""diffusion-trainer export: a checkpoint's weights in one safetensors file that says what it is."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

import diffusion_trainer
from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.finished import choices, compose, kind_of, written
from diffusion_trainer.apps.initial import DESCRIBING, FILE, checkpoint_in, run_of
from diffusion_trainer.apps.nodes import Schema, hint
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole
from diffusion_trainer.training.checkpoint_files import sync
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint
from diffusion_trainer.training.consolidation import consolidate, kinds_of

SUFFIX = ".safetensors"
WRITER = "written_by"  # in the metadata: a file without it is not ours to replace
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FileConfig(Schema):
    """What the top levels of conf/export.yaml and conf/ema.yaml share."""

    checkpoint: str
    out: str | None
    dtype: Literal["fp32", "bf16", "fp16"]
    overwrite: bool


class ExportConfig(FileConfig):
    weights: str


def show(overrides: Sequence[str]) -> str:
    return configuration.dump(_load(overrides))


def _load(overrides: Sequence[str]) -> dict:
    return compose("export", overrides, ExportConfig, ())


def main(overrides: Sequence[str]) -> int:
    config = _load(overrides)
    folder = checkpoint_in(Path(config["checkpoint"]))
    kind = _kind(Checkpoint(folder, whole=()), config["weights"])
    checkpoint = Checkpoint(folder, whole=(kind,))  # a snapshot of averages has no more than these
    run, dtype = run_of(checkpoint.folder), config["dtype"]
    out = Path(config["out"] or run / "exports" / f"{checkpoint.folder.name}-{kind}-{dtype}{SUFFIX}")
    check_place(out, config["overwrite"])
    metadata = about(checkpoint, kind) | {"dtype": dtype}
    with written(out):
        with whole(out) as part:
            size = consolidate(checkpoint, kind, part, DTYPES[dtype], metadata)
        sync(out.parent)
    numbers = sum(shape.numel() for shape in checkpoint.shapes.values())
    print(
        f"{kind} of {checkpoint.folder.name}: {len(checkpoint.shapes):,} tensors, {numbers:,} numbers in {dtype}, "
        f"{size / 1e6:,.1f} MB: {out}"
    )
    if (run / FILE).is_file():
        print(f"  what this run was given and did not train is not in it, but in {run / FILE}")
    return 0


def _kind(checkpoint: Checkpoint, weights: str) -> str:
    """What the other verbs call by `weights`, or a kind of the checkpoint by its own name; no optimizer's moments."""
    there = kinds_of(checkpoint)
    kind = weights if weights in there else kind_of(weights)
    if kind not in there:
        young = "; it is from before the first step, which begins the average" if there == [WEIGHT] else ""
        raise UserError(
            f"checkpoint {checkpoint.folder} has no {weights} weights; it has weights="
            f"{' or '.join(choices(checkpoint))}{young}{hint(weights, choices(checkpoint))}"
        )
    return kind


def check_place(out: Path, overwrite: bool) -> None:
    """UserError if the file would not be found by its name, or something stands there that is not to be replaced."""
    if out.suffix != SUFFIX:
        raise UserError(f"out={out} must end in {SUFFIX}")
    if out.exists() and not overwrite:
        raise UserError(f"out={out} exists; replace it with overwrite=true, or choose another out=...")
    if out.exists() and not _is_export(out):
        raise UserError(f"out={out} was not written by export and is not replaced; choose another out=... or remove it")


def _is_export(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return WRITER in (file.metadata() or {})
    except (OSError, SafetensorError):  # a folder, or no safetensors file at all
        return False


def about(checkpoint: Checkpoint, kind: str) -> dict[str, str]:
    """The metadata: whose weights they are, and the parts of the run's configuration that give them a meaning."""
    path = run_of(checkpoint.folder) / "config.yaml"
    config = configuration.read(path)
    return {
        "format": "pt",  # other libraries ask for it before they load a file into torch
        WRITER: f"diffusion-trainer {diffusion_trainer.__version__}",
        "run": str(config["name"]),
        "checkpoint": checkpoint.folder.name,
        "images_seen": str(checkpoint.images_seen),
        "weights": kind,
        "config_sha256": sha256(path.read_bytes()).hexdigest(),
        **{group: json.dumps(config[group]) for group in DESCRIBING},
    }
