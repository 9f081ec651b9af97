"""A trained model, read from a run's folder: what the verbs after `train` have in common."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import initial, statistics
from diffusion_trainer.apps.initial import checkpoint_in, run_of
from diffusion_trainer.apps.nodes import Schema, build
from diffusion_trainer.apps.parts import Parts, check_latents, check_sampling, check_variance, dtype_of, generator_of
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint
from diffusion_trainer.training.ema import KEY, key_of
from diffusion_trainer.training.model import Model

MODEL = ("objective", "network", "conditioning", "data")
DRAWING = ("sampler", "variance", "guidance")
FROM_THE_RUN = (*MODEL, *DRAWING)


class ModelConfig(Schema):
    """What the top levels of conf/<verb>.yaml share for all verbs but train."""

    checkpoint: str
    out: str | None
    weights: str
    accelerator: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    allowed_targets: list[str]
    objective: dict
    network: dict
    conditioning: dict
    data: dict


class FinishedConfig(ModelConfig):
    """What those share that draw samples."""

    sampler: dict
    variance: dict
    guidance: dict


def compose(verb: str, overrides: Sequence[str], schema: type[Schema], groups: Sequence[str]) -> dict:
    """The verb's configuration; groups that no override chooses are those of the checkpoint's run."""
    named = configuration.value_of(overrides, "checkpoint")
    if named is None:
        raise UserError(f"checkpoint is missing: say checkpoint=runs/<name>, as in {verb} checkpoint=runs/digits")
    run = configuration.read(run_of(checkpoint_in(Path(str(named)))) / "config.yaml")
    return configuration.load(verb, overrides, schema, {name: _tamed(run[name]) for name in groups if name in run})


def _tamed(node: Any) -> Any:
    """A run's folder may be another's: what it says may be a shell command is that only for who says so, too."""
    if isinstance(node, Mapping):
        return {key: False if key == "allow_pipe" else _tamed(value) for key, value in node.items()}
    return [_tamed(value) for value in node] if isinstance(node, list) else node


def load(verb: str, overrides: Sequence[str], schema: type[Schema], groups: Sequence[str] = FROM_THE_RUN) -> dict:
    """`compose`, with the checkpoint's own statistics where none are named; UserError for those of another model."""
    config = compose(verb, overrides, schema, groups)
    return statistics.resolve(config, checkpoint_in(Path(config["checkpoint"])), config["weights"])


def check(config: Mapping[str, Any]) -> None:
    """UserError if the checkpoint does not hold the model that the configuration describes. No weight is read."""
    device_of(config["accelerator"])
    parts = Parts.of(config, device="meta")
    _check_weights(checkpoint_of(config), parts, parts.model(torch.float32), config["weights"])


def check_drawing(config: Mapping[str, Any]) -> None:
    """UserError if sampler, variance and the statistics that they read do not go together, or not with the model."""
    check_sampling(config, config["accelerator"])
    check_latents(config)
    statistics.check_bound(config, build(config["sampler"], "sampler", config["allowed_targets"]).x_0_bound)


def checkpoint_of(config: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(checkpoint_in(Path(config["checkpoint"])))


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
        checkpoint, device = checkpoint_of(config), device_of(config["accelerator"])
        check_variance(config)
        parts, model = loaded(config, checkpoint, config["weights"], device)
        generator = generator_of(config, model, parts.objective, device, seed)
        return cls(checkpoint, model, generator, parts, device)

    def provenance(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return provenance_of(config, self.checkpoint, self.generator.seed, DRAWING)


def provenance_of(config: Mapping[str, Any], checkpoint: Checkpoint, seed: int, groups: Sequence[str]) -> dict:
    """Which weights, and the groups of the configuration that made numbers or pictures of them."""
    return {
        "checkpoint": str(checkpoint.folder),
        "images_seen": checkpoint.images_seen,
        "seed": seed,
        **{name: config[name] for name in ("weights", *groups, "precision")},
        **statistics.digest_of(config["weights"]),
    }


def loaded(
    config: Mapping[str, Any], checkpoint: Checkpoint, weights: str, device: torch.device
) -> tuple[Parts, Model]:
    """The model that a run's configuration describes, with `weights` of its checkpoint (see kind_of)."""
    parts = Parts.of(config)
    model = parts.model(dtype_of(config["precision"], device.type)).to(device).eval()
    kind = _check_weights(checkpoint, parts, model, weights)
    model.requires_grad_(False)
    names = {name for name, _ in model.named_parameters()}
    given = {name: weight for name, weight in initial.read(run_of(checkpoint.folder)).items() if name in names}
    found = {**given, **(checkpoint.whole(kind) if kind else _from_file(weights, checkpoint))}
    if names - set(found):
        raise UserError(
            f"{run_of(checkpoint.folder) / initial.FILE} is missing: it holds the weights that this run did not train; "
            "the run's train command writes it again"
        )
    model.load_state_dict(found, strict=True)
    return parts, model


def _check_weights(checkpoint: Checkpoint, parts: Parts, model: Model, weights: str) -> str | None:
    """The kind of the checkpoint's tensors that `weights` means, None for a file; UserError if it has none."""
    trained = {name: p.shape for name, p in model.named_parameters() if parts.objective.trains(name)}
    checkpoint.check_architecture(trained)
    kind = kind_of(weights)
    if kind and kind not in checkpoint.kinds:
        there = " or ".join(choices(checkpoint))
        raise UserError(f"checkpoint {checkpoint.folder} has no {weights} weights; it has weights={there}")
    return kind


def _from_file(path: str, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What `export` or `ema` has written; UserError if it does not hold this run's parameters."""
    try:
        with safe_open(path, framework="pt") as file:
            written = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights={path} cannot be read ({error})") from error
    ours = str(configuration.read(run_of(checkpoint.folder) / "config.yaml")["name"])
    if written.get("run") != ours or {n: t.shape for n, t in tensors.items()} != checkpoint.shapes:
        raise UserError(
            f"weights={path} is of run {written.get('run')}, the checkpoint of {ours}; use a file of its own"
        )
    return tensors


def kind_of(weights: str) -> str | None:
    """Of a checkpoint's tensors: raw are those that were trained, ema is the run's (main) average, any other name one
    of the profiles of ema=several. None for a file's name, which ends in .safetensors.
    """
    if weights.endswith(".safetensors"):
        return None
    return {"raw": WEIGHT, "ema": KEY}.get(weights) or key_of(weights)


def choices(checkpoint: Checkpoint) -> list[str]:
    """What `weights` may be."""
    averages = [kind.removeprefix(key_of("")) for kind in sorted(checkpoint.kinds) if kind.startswith(KEY)]
    return [*(["raw"] if WEIGHT in checkpoint.kinds else []), *averages]


def device_of(accelerator: str) -> torch.device:
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("accelerator=cuda: this machine has no CUDA device; use auto or cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def written(out: Path) -> Iterator[None]:
    """Around writing what was asked for: UserError if it cannot be written where `out` says."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise UserError(f"out={out} cannot be written ({error}); choose another out=...") from error
