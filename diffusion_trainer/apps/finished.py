"""A trained model, read from a run's folder: what `sample` and `evaluate` have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import initial, statistics
from diffusion_trainer.apps.initial import checkpoint_in, run_of
from diffusion_trainer.apps.nodes import Schema
from diffusion_trainer.apps.parts import Parts, check_variance, dtype_of, generator_of
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint
from diffusion_trainer.training.ema import KEY
from diffusion_trainer.training.model import Model

FROM_THE_RUN = ("objective", "network", "conditioning", "data", "sampler", "variance", "guidance")


class FinishedConfig(Schema):
    """What the top levels of conf/sample.yaml and conf/evaluate.yaml share."""

    checkpoint: str
    out: str | None
    weights: Literal["ema", "raw"]
    accelerator: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    allowed_targets: list[str]
    objective: dict
    network: dict
    conditioning: dict
    data: dict
    sampler: dict
    variance: dict
    guidance: dict


def load(verb: str, overrides: Sequence[str], schema: type[Schema], groups: Sequence[str] = FROM_THE_RUN) -> dict:
    """The verb's configuration; groups that no override chooses are those of the checkpoint's run."""
    named = configuration.value_of(overrides, "checkpoint")
    if named is None:
        raise UserError(f"checkpoint is missing: say checkpoint=runs/<name>, as in {verb} checkpoint=runs/digits")
    checkpoint = checkpoint_in(Path(str(named)))
    run = configuration.read(run_of(checkpoint) / "config.yaml")
    known = {name: run[name] for name in groups if name in run}
    config = configuration.load(verb, overrides, schema, known)
    return statistics.resolve(config, checkpoint, config["weights"])


@dataclass(frozen=True)
class Finished:
    """A model with the weights of a checkpoint, ready to draw from."""

    checkpoint: Checkpoint
    model: Model
    generator: Generator
    parts: Parts
    device: torch.device

    @classmethod
    def of(cls, config: Mapping[str, Any], seed: int) -> "Finished":
        checkpoint = Checkpoint(checkpoint_in(Path(config["checkpoint"])))
        device = _device(config["accelerator"])
        check_variance(config)
        parts, model = loaded(config, checkpoint, config["weights"], device)
        generator = generator_of(config, model, parts.objective, device, seed)
        return cls(checkpoint, model, generator, parts, device)

    def provenance(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Which weights, and how they were drawn from."""
        return {
            "checkpoint": str(self.checkpoint.folder),
            "images_seen": self.checkpoint.images_seen,
            "seed": self.generator.seed,
            **{name: config[name] for name in ("weights", "sampler", "variance", "guidance", "precision")},
        }


def loaded(
    config: Mapping[str, Any], checkpoint: Checkpoint, weights: str, device: torch.device
) -> tuple[Parts, Model]:
    """The model that a run's configuration describes, with the weights ("ema" or "raw") of its checkpoint."""
    parts = Parts.of(config)
    model = parts.model(dtype_of(config["precision"], device.type)).to(device).eval().requires_grad_(False)
    trained = {name: p.shape for name, p in model.named_parameters() if parts.objective.trains(name)}
    checkpoint.check_architecture(trained)
    kind = KEY if weights == "ema" else WEIGHT
    if kind not in checkpoint.kinds:
        raise UserError(f"checkpoint {checkpoint.folder} has no {weights} weights; use weights=raw")
    names = {name for name, _ in model.named_parameters()}
    given = {name: weight for name, weight in initial.read(run_of(checkpoint.folder)).items() if name in names}
    found = {**given, **checkpoint.whole(kind)}
    if names - set(found):
        raise UserError(
            f"{run_of(checkpoint.folder) / initial.FILE} is missing: it holds the weights that this run did not train; "
            "the run's train command writes it again"
        )
    model.load_state_dict(found, strict=True)
    return parts, model


def _device(accelerator: str) -> torch.device:
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("accelerator=cuda: this machine has no CUDA device; use auto or cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
