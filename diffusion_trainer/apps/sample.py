"""diffusion-trainer sample: draws from a checkpoint, writes a picture and an .npz."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_trainer.apps.config import dump
from diffusion_trainer.apps.finished import Finished, FinishedConfig, load, run_of
from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation import pictures
from diffusion_trainer.training.module import to_pixels


class SampleConfig(FinishedConfig):
    n: int
    seed: int
    batch_size: int
    label: int | None


def show(overrides: Sequence[str]) -> str:
    return dump(load("sample", overrides, SampleConfig))


def main(overrides: Sequence[str]) -> int:
    config = load("sample", overrides, SampleConfig)
    if config["n"] < 1 or config["batch_size"] < 1:
        raise UserError(f"n={config['n']} and batch_size={config['batch_size']} must be positive")
    finished = Finished.of(config, config["seed"])
    conditions = conditions_of(config, finished.parts.conditioning)
    start = time.monotonic()
    batches = finished.generator.batches(conditions, config["n"], config["batch_size"])
    images = torch.cat([to_pixels(x_0).cpu() for x_0, _ in batches])
    out = out_of(config, finished)
    try:
        write(out, images, conditions, finished.provenance(config))
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error}); choose another out=...") from error
    seconds = time.monotonic() - start
    print(f"{config['n']} samples in {seconds:.1f} s: {out}.png and {out}.npz (images, label, provenance)")
    return 0


def conditions_of(config: Mapping[str, Any], conditioning: Conditioning) -> Tensor | None:
    """(n, ...) on the CPU; UserError for a label that the model does not have."""
    if config["label"] is None:
        return conditioning.examples(config["n"])
    if "label" not in conditioning.fields:
        raise UserError(f"label={config['label']}: this model has no labels")
    labels = torch.full((config["n"],), config["label"])
    conditioning.check({"label": labels})
    return labels


def out_of(config: Mapping[str, Any], finished: Finished) -> Path:
    if config["out"] is not None:
        return Path(config["out"])
    label = "all" if config["label"] is None else config["label"]
    return run_of(finished.checkpoint.folder) / "drawn" / f"label-{label}-seed-{config['seed']}"


def write(out: Path, images: Tensor, labels: Tensor | None, provenance: Mapping[str, Any]) -> None:
    pictures.save(
        pictures.grid(images, columns_for(len(images)), pictures.scale_for(images.shape[2])), Path(f"{out}.png")
    )
    part = out.with_name(f".{out.name}.part.npz")
    arrays = {} if labels is None else {"label": labels.numpy()}
    np.savez(part, images=images.numpy(), provenance=json.dumps(provenance), **arrays)
    part.replace(f"{out}.npz")


def columns_for(n: int) -> int:
    """About square."""
    return max(1, round(n**0.5))
