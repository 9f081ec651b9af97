"""diffusion-trainer evaluate: metrics of a checkpoint, printed and written with their provenance."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion_trainer.apps.config import dump
from diffusion_trainer.apps.finished import FROM_THE_RUN, Finished, FinishedConfig, load, run_of
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import check_sampling
from diffusion_trainer.callbacks.evaluating import describe
from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.agreement import Agreement


class EvaluateConfig(FinishedConfig):
    evaluation: dict | None


def _load(overrides: Sequence[str]) -> dict:
    return load("evaluate", overrides, EvaluateConfig, (*FROM_THE_RUN, "evaluation"))


def show(overrides: Sequence[str]) -> str:
    return dump(_load(overrides))


def main(overrides: Sequence[str]) -> int:
    config = _load(overrides)
    if config["evaluation"] is None:
        raise UserError("this run has no evaluation; choose one: evaluation=digits")
    evaluation = build(config["evaluation"], "evaluation", config["allowed_targets"])
    check_sampling(config)
    finished = Finished.of(config, evaluation.seed)
    prepared = evaluation.prepare(finished.device, Agreement())
    conditioning = finished.parts.conditioning
    if prepared.labels is not None and conditioning.fields:
        conditioning.check({"label": torch.tensor(prepared.labels)})
    metrics = prepared(finished.generator, bool(conditioning.fields))
    report = {"metrics": metrics, "provenance": prepared.provenance() | finished.provenance(config)}
    folder = finished.checkpoint.folder
    out = Path(config["out"] or run_of(folder) / "evaluations" / f"{folder.name}.json")
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(report, indent=2) + "\n")
        part.replace(out)
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error}); choose another out=...") from error
    sampler, guidance, real = config["sampler"], config["guidance"], len(evaluation.reference.samples)
    print(
        f"{describe(metrics)}\n"
        f"  {folder}, {config['weights']} weights, {prepared.count:,} samples against {real:,} "
        f"images, {_name(sampler['solver'])} in {sampler['num_steps']} steps, "
        f"{_name(guidance)} {guidance.get('scale', '')}".rstrip()
        + f", seed {evaluation.seed}\n  written with its whole provenance to {out}"
    )
    return 0


def _name(node: dict) -> str:
    return node["_target_"].rsplit(".", 1)[-1]
