"""diffusion-trainer likelihood: bits per dimension of images under a checkpoint, term by term.

Under torchrun or srun the ranks share the images.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_trainer.apps.config import dump
from diffusion_trainer.apps.finished import FROM_THE_RUN, Finished, FinishedConfig, load
from diffusion_trainer.apps.initial import run_of
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.processes import agreeing
from diffusion_trainer.conventions import UserError
from diffusion_trainer.sampling.likelihood import Likelihood
from diffusion_trainer.sampling.noise import SampleNoise
from diffusion_trainer.streaming.datamodule import ShardData, collate
from diffusion_trainer.training.agreement import Agreement


class LikelihoodConfig(FinishedConfig):
    n: int | None
    batch_size: int
    seed: int
    likelihood: dict


def _load(overrides: Sequence[str]) -> dict:
    return load("likelihood", overrides, LikelihoodConfig, FROM_THE_RUN)


def show(overrides: Sequence[str]) -> str:
    return dump(_load(overrides))


def main(overrides: Sequence[str]) -> int:
    config = _load(overrides)
    if config["batch_size"] < 1 or (config["n"] is not None and config["n"] < 1):
        raise UserError(f"n={config['n']} and batch_size={config['batch_size']} must be positive")
    likelihood, data = (build(config[g], g, config["allowed_targets"]) for g in ("likelihood", "data"))
    with agreeing() as agreement:
        finished = Finished.of(config, config["seed"])
        count = min(config["n"] or len(data.samples), len(data.samples))
        try:
            shares = agreement.gather(list(terms(config, finished, likelihood, data, count, agreement)))
        except ValueError as error:
            raise UserError(f"likelihood: {error}") from error
        if agreement.rank == 0:
            report(config, finished, join([batch for share in shares for batch in share]), count)
    return 0


def terms(
    config: Mapping[str, Any],
    finished: Finished,
    likelihood: Likelihood,
    data: ShardData,
    count: int,
    agreement: Agreement,
) -> Iterator[dict[str, Tensor]]:
    """Of this rank's images, batch by batch; image i has the randomness of (seed, i)."""
    generator, conditioning = finished.generator, finished.parts.conditioning
    mine = range(agreement.rank, count, agreement.world)
    for first in range(0, len(mine), config["batch_size"]):
        numbers = list(mine[first : first + config["batch_size"]])
        batch = collate([data.decode(i) for i in numbers])
        conditioning.check(batch)
        batch = {name: value.to(finished.device) for name, value in batch.items()}
        noise = SampleNoise(config["seed"], numbers, data.image_shape, finished.device)
        found = likelihood(
            generator.denoiser, generator.schedule, generator.variance, batch["image"], conditioning.read(batch), noise
        )
        yield {name: value.cpu() for name, value in found.items()}


def join(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def report(config: Mapping[str, Any], finished: Finished, found: Mapping[str, Tensor], count: int) -> None:
    """Prints and writes the means of all terms with their standard errors (none of a single image)."""
    summary = {
        name: {"mean": value.mean().item(), "standard_error": value.std().item() / count**0.5 if count > 1 else None}
        for name, value in found.items()
    }
    folder = finished.checkpoint.folder
    kind = config["likelihood"]["_target_"].rsplit(".", 1)[-1].lower()
    out = Path(config["out"] or run_of(folder) / "likelihoods" / f"{folder.name}-{kind}.json")
    provenance = {k: v for k, v in finished.provenance(config).items() if k not in ("sampler", "guidance")}
    provenance |= {"likelihood": config["likelihood"], "num_images": count, "data": config["data"]}
    part = out.with_name(f".{out.name}.part")
    metrics = {name: value["mean"] for name, value in summary.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"metrics": metrics, "terms": summary, "provenance": provenance}, indent=2) + "\n")
        part.replace(out)
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error}); choose another out=...") from error
    total = summary.pop("bits_per_dim")
    parts = ", ".join(f"{name} {value['mean']:.4f}" for name, value in summary.items())
    error = f" (standard error {total['standard_error']:.4f})" if count > 1 else ""
    print(
        f"{total['mean']:.4f} bits/dim{error} over {count:,} images: {parts}\n"
        f"  written with its whole provenance to {out}"
    )
