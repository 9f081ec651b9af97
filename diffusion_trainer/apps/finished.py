"""A trained model, read from a run's folder: what `sample` and `evaluate` have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.nodes import Schema, build
from diffusion_trainer.apps.parts import Parts, dtype_of
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.training import checkpoints
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint
from diffusion_trainer.training.ema import KEY

FROM_THE_RUN = ("schedule", "prediction", "network", "conditioning", "data", "sampler", "guidance")


class FinishedConfig(Schema):
    """What the top levels of conf/sample.yaml and conf/evaluate.yaml share."""

    checkpoint: str
    out: str | None
    weights: Literal["ema", "raw"]
    accelerator: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    allowed_targets: list[str]
    schedule: dict
    prediction: dict
    network: dict
    conditioning: dict
    data: dict
    sampler: dict
    guidance: dict


def load(verb: str, overrides: Sequence[str], schema: type[Schema], groups: Sequence[str] = FROM_THE_RUN) -> dict:
    """The verb's configuration; groups that no override chooses are those of the checkpoint's run."""
    named = configuration.value_of(overrides, "checkpoint")
    if named is None:
        raise UserError(f"checkpoint is missing: say checkpoint=runs/<name>, as in {verb} checkpoint=runs/digits")
    run = configuration.read(run_of(checkpoint_in(Path(str(named)))) / "config.yaml")
    known = {name: run[name] for name in groups if name in run}
    return configuration.load(verb, overrides, schema, known)


def checkpoint_in(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest of a run; UserError if there is none."""
    if (path / "manifest.json").is_file():
        return path
    newest = checkpoints.latest(path / "checkpoints")
    if newest is None:
        raise UserError(
            f"checkpoint={path}: there is no checkpoint; give a run's folder (runs/<name>) or one of its checkpoints"
        )
    return newest


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint, as short as it can be said."""
    run = checkpoint.resolve().parent.parent
    return run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run


@dataclass(frozen=True)
class Finished:
    """A model with the weights of a checkpoint, ready to draw from."""

    checkpoint: Checkpoint
    generator: Generator
    parts: Parts
    device: torch.device

    @classmethod
    def of(cls, config: Mapping[str, Any], seed: int) -> "Finished":
        checkpoint = Checkpoint(checkpoint_in(Path(config["checkpoint"])))
        device = _device(config["accelerator"])
        parts = Parts.of(config)
        model = parts.model(dtype_of(config["precision"], device.type)).to(device).eval().requires_grad_(False)
        checkpoint.check_architecture({name: p.shape for name, p in model.named_parameters()})
        kind = KEY if config["weights"] == "ema" else WEIGHT
        if kind not in checkpoint.kinds:
            raise UserError(f"checkpoint {checkpoint.folder} has no {config['weights']} weights; use weights=raw")
        model.load_state_dict(checkpoint.whole(kind), strict=True)
        allowed = config["allowed_targets"]
        generator = Generator(
            model.denoiser(parts.schedule, parts.prediction), parts.schedule,
            build(config["sampler"], "sampler", allowed), build(config["guidance"], "guidance", allowed),
            build(config["data"], "data", allowed).image_shape, device, seed,
        )  # fmt: skip
        return cls(checkpoint, generator, parts, device)

    def provenance(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Which weights, and how they were drawn from."""
        return {
            "checkpoint": str(self.checkpoint.folder),
            "images_seen": self.checkpoint.images_seen,
            "seed": self.generator.seed,
            **{name: config[name] for name in ("weights", "sampler", "guidance", "precision")},
        }


def _device(accelerator: str) -> torch.device:
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("accelerator=cuda: this machine has no CUDA device; use auto or cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
