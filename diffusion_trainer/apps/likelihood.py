"""diffusion-trainer likelihood: bits per dimension of images under a checkpoint, term by term.

Under torchrun or srun the ranks share the images.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_trainer.apps import finished, statistics
from diffusion_trainer.apps.config import dump
from diffusion_trainer.apps.finished import MODEL, ModelConfig, written
from diffusion_trainer.apps.initial import run_of
from diffusion_trainer.apps.measuring import Measuring, measuring
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import check_precision, check_variance
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.real import images_of
from diffusion_trainer.evaluation.writing import whole
from diffusion_trainer.sampling.likelihood import Likelihood
from diffusion_trainer.sampling.noise import SampleNoise
from diffusion_trainer.training.checkpoints import Checkpoint


class LikelihoodConfig(ModelConfig):
    variance: dict
    n: int | None
    batch_size: int
    seed: int
    likelihood: dict


def _load(overrides: Sequence[str]) -> dict:
    return finished.load("likelihood", overrides, LikelihoodConfig, (*MODEL, "variance"))


def show(overrides: Sequence[str]) -> str:
    return dump(_load(overrides))


def check(overrides: Sequence[str]) -> dict:
    """The configuration; UserError for what can be known to fail before weights are read."""
    config = _load(overrides)
    if config["batch_size"] < 1 or (config["n"] is not None and config["n"] < 1):
        raise UserError(f"n={config['n']} and batch_size={config['batch_size']} must be positive")
    likelihood = build(config["likelihood"], "likelihood", config["allowed_targets"])
    check_precision(config, config["accelerator"], "likelihood", likelihood)
    check_variance(config)
    if statistics.BOUND in config["likelihood"]:  # a flow has none: it reads no variance
        statistics.check_bound(config, config["likelihood"][statistics.BOUND])
    finished.check(config)
    return config


def main(overrides: Sequence[str]) -> int:
    config = check(overrides)
    with measuring(config) as m:
        count = min(config["n"] or m.data.count, m.data.count)
        try:
            likelihood = fitted(config, m, count)
            shares = m.agreement.gather(list(terms(config, likelihood, m, count)))
        except ValueError as error:
            raise UserError(f"likelihood: {error}") from error
        if m.agreement.rank == 0:
            found = join([batch for share in shares for batch in share])
            report(config, likelihood.learned, m.checkpoint, found, count)
    return 0


def fitted(config: Mapping[str, Any], m: Measuring, count: int) -> Likelihood:
    """The likelihood, fitted to the model on the first images if it has to be."""
    likelihood = build(config["likelihood"], "likelihood", config["allowed_targets"])
    numbers = range(min(likelihood.num_images, count))
    if not numbers:
        return likelihood
    images, condition = images_of(m.data, numbers, m.conditioning, m.device)
    mine = likelihood.fitted(m.denoiser, m.schedule, images, condition, config["seed"])
    return m.agreement.gather(mine)[0]  # every rank has fitted the same, but for its device's rounding


def terms(config: Mapping[str, Any], likelihood: Likelihood, m: Measuring, count: int) -> Iterator[dict[str, Tensor]]:
    """Of this rank's images, batch by batch; image i has the randomness of (seed, i)."""
    variance = build(config["variance"], "variance", config["allowed_targets"])
    mine = range(m.agreement.rank, count, m.agreement.world)
    for first in range(0, len(mine), config["batch_size"]):
        numbers = list(mine[first : first + config["batch_size"]])
        images, condition = images_of(m.data, numbers, m.conditioning, m.device)
        noise = SampleNoise(config["seed"], numbers, m.data.image_shape, m.device)
        found = likelihood(m.denoiser, m.schedule, variance, images, condition, noise)
        yield {name: value.cpu() for name, value in found.items()}


def join(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def report(
    config: Mapping[str, Any],
    learned: Mapping[str, Any],
    checkpoint: Checkpoint,
    found: Mapping[str, Tensor],
    count: int,
) -> None:
    """Prints and writes the means of all terms with their standard errors (none of a single image)."""
    summary = {
        name: {"mean": value.mean().item(), "standard_error": value.std().item() / count**0.5 if count > 1 else None}
        for name, value in found.items()
    }
    parts = config["likelihood"], config["likelihood"].get("dequantization")
    kind = "-".join(part["_target_"].rsplit(".", 1)[-1].lower() for part in parts if part)
    out = Path(config["out"] or run_of(checkpoint.folder) / "likelihoods" / f"{checkpoint.folder.name}-{kind}.json")
    provenance = finished.provenance_of(config, checkpoint, config["seed"], ("variance", "likelihood", "data"))
    provenance |= {"num_images": count} | ({"fitted": learned} if learned else {})
    metrics = {name: value["mean"] for name, value in summary.items()}
    text = json.dumps({"metrics": metrics, "terms": summary, "provenance": provenance}, indent=2)
    with written(out), whole(out) as part:
        part.write_text(text + "\n")
    total = summary.pop("bits_per_dim")
    parts = ", ".join(f"{name} {value['mean']:.4f}" for name, value in summary.items())
    error = f" (standard error {total['standard_error']:.4f})" if count > 1 else ""
    print(
        f"{total['mean']:.4f} bits/dim{error} over {count:,} images: {parts}\n"
        f"  written with its whole provenance to {out}"
    )
