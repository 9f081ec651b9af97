"""diffusion-trainer train: checks everything, starts the ranks, says what came of it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps import processes
from diffusion_trainer.apps.config import build
from diffusion_trainer.apps.parts import TrainConfig, check_network, parameter_shapes
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.features import TorchScriptFeatures
from diffusion_trainer.streaming.datamodule import Layout
from diffusion_trainer.training import checkpoints


def show(overrides: Sequence[str]) -> str:
    """The configuration that main would run with."""
    return configuration.dump(configuration.load("train", overrides, TrainConfig))


def main(overrides: Sequence[str]) -> int:
    """The exit code: 0 done, 2 a mistake in the arguments, 130 or 143 stopped by a signal, 1 anything else."""
    config = configuration.load("train", overrides, TrainConfig)
    folder = Path(config["folder"])
    world = processes.current()
    strategy, trainer = build(config["strategy"], "strategy"), build(config["trainer"], "trainer")
    count = world.local_size if world else trainer.local_processes(strategy)
    size = world.size if world else count
    if world is None or world.rank == 0:
        preflight(config, size, folder)
    if world is not None:
        from diffusion_trainer.apps.rank import work  # DeepSpeed and all: only where training happens

        return work(config, folder, world)
    with folders.held(folder):
        folders.write_config(folder, config)
        announce(config, count, trainer.device(), folder)
        code = processes.spawn(["-m", "diffusion_trainer.apps.rank", str(folder)], count, folder / "logs", {})
    if code == 0:
        summarize(config, folder)
    return code


def preflight(config: dict[str, Any], world: int, folder: Path) -> None:
    """UserError for what can be known to fail before a process or a device is touched."""
    sizes(config, world)
    allowed = config["allowed_targets"]
    for group in ("objective", "optimizer", "ema", "sampler", "guidance", "callbacks", "logger"):
        build(config[group], group, allowed)
    folders.check(folder, config)
    data = build(config["data"], "data", allowed)
    check_network(config, data.image_shape)
    data.decode(0)
    evaluation = build(config["evaluation"], "evaluation", allowed)
    if evaluation is not None:
        evaluation.reference.decode(0)
        TorchScriptFeatures(evaluation.features, evaluation.reference.image_shape, "cpu")
    newest = checkpoints.latest(folder / "checkpoints")
    if newest is not None:
        checkpoints.Checkpoint(newest).check_architecture(parameter_shapes(config))


def sizes(config: dict[str, Any], world: int) -> None:
    batch, lanes, pieces = config["batch_size"], config["lanes"], world * config["trainer"]["accumulate_grad_batches"]
    for key in ("batch_size", "lanes", "num_images"):
        if config[key] < 1:
            raise UserError(f"{key} must be positive, not {config[key]}")
    if not 0 <= config["condition_dropout"] <= 1:
        raise UserError(f"condition_dropout must lie in [0, 1], not {config['condition_dropout']}")
    Layout(batch, world, 0, config["trainer"]["accumulate_grad_batches"])
    if batch % lanes or lanes % pieces:
        raise UserError(
            f"lanes={lanes} must divide batch_size={batch} and be a multiple of the {pieces} pieces that processes and "
            f"accumulation cut it into (each lane draws its own randomness); lanes={pieces} would do"
        )


def announce(config: dict[str, Any], count: int, device: str, folder: Path) -> None:
    newest = checkpoints.latest(folder / "checkpoints")
    at = f", resuming from {newest.name}" if newest else ""
    shapes = parameter_shapes(config)
    million = sum(s.numel() for s in shapes.values()) / 1e6
    strategy = config["strategy"].get("stage")
    how = f"ZeRO-{strategy}" if strategy else config["strategy"]["_target_"].rsplit(".", 1)[-1]
    print(
        f"run {config['name']} in {folder}: {million:.2f} M parameters, {how} on {count} {device} processes{at}",
        flush=True,
    )


def summarize(config: dict[str, Any], folder: Path) -> None:
    """What was made, where it is, how good it is, what to try next."""
    newest = checkpoints.latest(folder / "checkpoints")
    try:
        report = json.loads((folder / "metrics.json").read_text())
    except FileNotFoundError:
        report = None
    from diffusion_trainer.callbacks.evaluating import describe

    quality = describe(report["metrics"]) if report else f"not measured: diffusion-trainer evaluate checkpoint={folder}"
    first = report["history"][0] if report else {}
    print(
        f"""
done: {config["name"]}, a diffusion model after {config["num_images"]:,} images
  quality     {quality}"""
        + (f" (FID at the start: {first['fid']:.1f})" if first.get("images_seen") == 0 else "")
        + f"""
  pictures    {folder}/samples.png (each evaluation's in {folder}/samples/)
  checkpoint  {newest}
  metrics     {folder}/metrics.json with their provenance, {folder}/metrics.csv, W&B in {folder}/wandb
  config      {folder}/config.yaml; the same command resumes or, with a larger num_images, goes on
try next
  diffusion-trainer sample checkpoint={folder} label=7 n=64 guidance.scale=2
  diffusion-trainer evaluate checkpoint={folder} sampler.num_steps=50
  diffusion-trainer train --help""",
        file=sys.stdout,
    )
