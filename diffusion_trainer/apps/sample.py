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
from diffusion_trainer.apps.finished import Finished, FinishedConfig, load
from diffusion_trainer.apps.initial import run_of
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import check_sampling
from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation import pictures
from diffusion_trainer.evaluation.modes import Answer, Mode, Request


class SampleConfig(FinishedConfig):
    n: int
    seed: int
    batch_size: int
    label: int | None
    mode: dict


def show(overrides: Sequence[str]) -> str:
    return dump(load("sample", overrides, SampleConfig))


def main(overrides: Sequence[str]) -> int:
    config = load("sample", overrides, SampleConfig)
    if config["n"] < 1 or config["batch_size"] < 1:
        raise UserError(f"n={config['n']} and batch_size={config['batch_size']} must be positive")
    mode, data = (build(config[g], g, config["allowed_targets"]) for g in ("mode", "data"))
    check_sampling(config)
    finished = Finished.of(config, config["seed"])
    conditioning = finished.parts.conditioning
    conditions = conditions_of(config, conditioning)
    start = time.monotonic()
    try:
        answer = mode(Request(finished.generator, data, conditioning, conditions, config["n"], config["batch_size"]))
    except ValueError as error:
        raise UserError(f"sampler: {error}") from error
    out = out_of(config, finished, mode)
    try:
        write(out, answer, finished.provenance(config))
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error}); choose another out=...") from error
    seconds = time.monotonic() - start
    names = ", ".join(["images", *answer.arrays, "provenance"])
    print(f"{answer.says}, in {seconds:.1f} s: {out}.png and {out}.npz ({names})")
    return 0


def conditions_of(config: Mapping[str, Any], conditioning: Conditioning) -> Tensor | None:
    """(n, ...) on the CPU; UserError for a label that the model does not have."""
    if config["label"] is None:
        return conditioning.examples(config["n"])
    if "label" not in conditioning.fields:
        raise UserError(f"label={config['label']}: this model has no labels")
    if abs(config["label"]) >= 2**63:
        raise UserError(f"label={config['label']} is out of range")
    labels = torch.full((config["n"],), config["label"])
    conditioning.check({"label": labels})
    return labels


def out_of(config: Mapping[str, Any], finished: Finished, mode: Mode) -> Path:
    if config["out"] is not None:
        return Path(config["out"])
    label = "all" if config["label"] is None else config["label"]
    return run_of(finished.checkpoint.folder) / "drawn" / f"{mode.prefix}label-{label}-seed-{config['seed']}"


def write(out: Path, answer: Answer, provenance: Mapping[str, Any]) -> None:
    images = answer.images
    columns = answer.columns or columns_for(len(images))
    pictures.save(pictures.grid(images, columns, pictures.scale_for(images.shape[2])), Path(f"{out}.png"))
    part = out.with_name(f".{out.name}.part.npz")
    arrays = {name: array.numpy() for name, array in answer.arrays.items()}
    np.savez(part, images=images.numpy(), provenance=json.dumps(provenance), **arrays)
    part.replace(f"{out}.npz")


def columns_for(n: int) -> int:
    """About square."""
    return max(1, round(n**0.5))
