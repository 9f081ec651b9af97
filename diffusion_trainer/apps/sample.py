"""diffusion-trainer sample: draws from a checkpoint, writes a picture and an .npz."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_trainer.apps import finished
from diffusion_trainer.apps.checks import check_guidance
from diffusion_trainer.apps.config import dump, within
from diffusion_trainer.apps.finished import Finished, FinishedConfig, check_drawing, written
from diffusion_trainer.apps.initial import run_of
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import Parts, warn_of_signal
from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation import pictures
from diffusion_trainer.evaluation.modes import Answer, Mode, Request
from diffusion_trainer.evaluation.writing import whole
from diffusion_trainer.process.variances import FixedSmall
from diffusion_trainer.sampling.guidance import NoGuidance


class SampleConfig(FinishedConfig):
    n: int
    seed: int
    batch_size: int
    label: int | None
    mode: dict


def _load(overrides: Sequence[str]) -> dict:
    config = finished.load("sample", overrides, SampleConfig)
    mode = build(config["mode"], "mode", config["allowed_targets"])
    unused = [VARIANCE] * mode.deterministic + [GUIDANCE] * (not mode.guided)
    aside = [override for group in unused for override in group.left_aside(config, overrides, mode)]
    return finished.load("sample", [*overrides, *aside], SampleConfig) if aside else config


@dataclass(frozen=True)
class Unused:
    """A group of the configuration that takes no part in some modes."""

    group: str
    nothing: Any  # what it builds then
    name: str  # of that, in conf/<group>
    why: str

    def left_aside(self, config: Mapping[str, Any], overrides: Sequence[str], mode: Mode) -> list[str]:
        """The override that leaves the run's own choice aside; UserError for one that is asked for."""
        given = within(overrides, self.group)
        if not given:
            return [f"{self.group}={self.name}"]
        if build(config[self.group], self.group, config["allowed_targets"]) != self.nothing:
            raise UserError(f"{' '.join(given)}: {mode} {self.why}; leave it out")
        return []


VARIANCE = Unused(
    "variance",
    FixedSmall(),
    "beta_tilde",
    "is a deterministic map between noise and images, which has no reverse variance",
)
GUIDANCE = Unused("guidance", NoGuidance(), "none", "is the map of the model itself, in which guidance takes no part")


def show(overrides: Sequence[str]) -> str:
    return dump(_load(overrides))


def check(overrides: Sequence[str]) -> dict:
    """The configuration; UserError for what can be known to fail before weights are read."""
    config = _load(overrides)
    if config["n"] < 1 or config["batch_size"] < 1:
        raise UserError(f"n={config['n']} and batch_size={config['batch_size']} must be positive")
    sampler, mode, data = (build(config[g], g, config["allowed_targets"]) for g in ("sampler", "mode", "data"))
    check_drawing(config)
    mode.check(sampler)
    if mode.guided:
        warn_of_signal(config)
        check_guidance(config, data.image_shape)
    conditions_of(config, Parts.of(config, device="meta").conditioning)
    finished.check(config)
    return config


def main(overrides: Sequence[str]) -> int:
    config = check(overrides)
    mode, data = (build(config[g], g, config["allowed_targets"]) for g in ("mode", "data"))
    done = Finished.of(config, config["seed"])
    conditioning = done.parts.conditioning
    conditions = conditions_of(config, conditioning)
    start = time.monotonic()
    try:
        answer = mode(
            Request(done.generator, data, conditioning, conditions, config["n"], config["batch_size"], config["label"])
        )
    except ValueError as error:
        raise UserError(f"sampler: {error}") from error
    out = out_of(config, done, mode)
    with written(out):
        write(out, answer, done.provenance(config))
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


def out_of(config: Mapping[str, Any], done: Finished, mode: Mode) -> Path:
    if config["out"] is not None:
        return Path(config["out"])
    label = "all" if config["label"] is None else config["label"]
    return run_of(done.checkpoint.folder) / "drawn" / f"{mode.prefix}label-{label}-seed-{config['seed']}"


def write(out: Path, answer: Answer, provenance: Mapping[str, Any]) -> None:
    images = answer.images
    columns = answer.columns or columns_for(len(images))
    pictures.save(pictures.grid(images, columns, pictures.scale_for(images.shape[2])), Path(f"{out}.png"))
    arrays = {name: array.numpy() for name, array in answer.arrays.items()}
    with whole(Path(f"{out}.npz")) as part, part.open("wb") as file:  # to a name, savez adds an ending of its own
        np.savez(file, images=images.numpy(), provenance=json.dumps(provenance), **arrays)


def columns_for(n: int) -> int:
    """About square."""
    return max(1, round(n**0.5))
