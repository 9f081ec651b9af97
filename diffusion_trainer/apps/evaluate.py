"""diffusion-trainer evaluate: metrics of a checkpoint, printed and written with their provenance."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffusion_trainer.apps import finished
from diffusion_trainer.apps.checks import check_evaluation, check_guidance
from diffusion_trainer.apps.config import dump
from diffusion_trainer.apps.finished import FROM_THE_RUN, Finished, FinishedConfig, check_drawing, written
from diffusion_trainer.apps.initial import run_of
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import warn_of_signal
from diffusion_trainer.callbacks.evaluating import describe
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole
from diffusion_trainer.training.agreement import Agreement


class EvaluateConfig(FinishedConfig):
    evaluation: dict | None


def _load(overrides: Sequence[str]) -> dict:
    return finished.load("evaluate", overrides, EvaluateConfig, (*FROM_THE_RUN, "evaluation"))


def show(overrides: Sequence[str]) -> str:
    return dump(_load(overrides))


def check(overrides: Sequence[str]) -> dict:
    """The configuration; UserError for what can be known to fail before weights are read."""
    config = _load(overrides)
    if config["evaluation"] is None:
        raise UserError("this run has no evaluation; choose one: evaluation=digits")
    evaluation, data = (build(config[g], g, config["allowed_targets"]) for g in ("evaluation", "data"))
    check_drawing(config)
    warn_of_signal(config)
    check_guidance(config, data.image_shape)
    check_evaluation(config, data, evaluation)
    finished.check(config)
    return config


def main(overrides: Sequence[str]) -> int:
    config = check(overrides)
    evaluation = build(config["evaluation"], "evaluation", config["allowed_targets"])
    done = Finished.of(config, evaluation.seed)
    prepared = evaluation.prepare(done.device, Agreement(), done.parts.conditioning)
    metrics = prepared(done.generator)
    report = {"metrics": metrics, "provenance": prepared.provenance() | done.provenance(config)}
    folder = done.checkpoint.folder
    out = Path(config["out"] or run_of(folder) / "evaluations" / f"{folder.name}.json")
    with written(out), whole(out) as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
    sampler, guidance, real = config["sampler"], config["guidance"], evaluation.reference.count
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
