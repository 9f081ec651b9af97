"""diffusion-trainer train: checks everything, starts the ranks, says what came of it."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from diffusion_trainer.apps import completion, folder_lock, initial, processes, statistics
from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps.checks import (
    check_data,
    check_evaluation,
    check_guidance,
    check_heartbeat,
    check_pictures,
    check_secrets,
)
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import (
    Parts,
    TrainConfig,
    check_latents,
    check_network,
    check_sampling,
    parameter_shapes,
    warn_of_signal,
)
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks.attempts import printing
from diffusion_trainer.callbacks.ema_snapshots import EmaSnapshots, lengths
from diffusion_trainer.callbacks.evaluating import describe
from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.training import checkpoints
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.resuming import resumable

CHECKED = ("optimizer", "ema", "guidance", "callbacks", "logger")  # what is built once to see that it can be


def show(overrides: Sequence[str]) -> str:
    """The configuration that main would run with."""
    return configuration.dump(configuration.load("train", overrides, TrainConfig))


def check(overrides: Sequence[str]) -> dict:
    """The configuration; UserError for what can be known to fail before a process or a device is touched."""
    config = configuration.load("train", overrides, TrainConfig)
    _, size = started(config, processes.current())
    preflight(config, size, Path(config["folder"]))
    return config


def processes_of(config: dict[str, Any], world: World | None) -> tuple[int, int]:
    """How many processes this machine is to have, and how many the run; UserError if the strategy has fewer."""
    strategy, trainer = (build(config[name], name, config["allowed_targets"]) for name in ("strategy", "trainer"))
    count = world.local_size if world else trainer.local_processes(strategy)
    size = world.size if world else count
    if strategy.max_processes and size > strategy.max_processes:
        raise UserError(f"{size} processes were started, this strategy has {strategy.max_processes}; use strategy=ddp")
    return count, size


def started(config: dict[str, Any], world: World | None) -> tuple[int, int]:
    """As processes_of, for the processes that there are; UserError if the configuration says otherwise."""
    said = config["trainer"]["processes"]
    if world and said not in (None, world.local_size):
        raise UserError(
            f"trainer.processes={said}, but srun or torchrun has started {world.local_size} on this node: "
            "have it start so many, or leave trainer.processes out (inside `srun --pty`, which starts one, `env -u "
            "SLURM_STEP_NUM_TASKS diffusion-trainer ...` has as many as you say)"
        )
    return processes_of(config, world)


def main(overrides: Sequence[str]) -> int:
    """The exit code: 0 done, 2 a mistake in the arguments, 128 + n stopped by signal n, 75 to be started again (only
    where others started this process), 76 no progress, 1 anything else.
    """
    config = configuration.load("train", overrides, TrainConfig)
    folder, world = Path(config["folder"]), processes.current()
    with printing() as log:
        log.leave()  # a rank has its own
        return _run(config, folder, world)


def _run(config: dict[str, Any], folder: Path, world: World | None) -> int:
    count, size = started(config, world)
    first = world is None or world.rank == 0
    given = preflight(config, size, folder) if first else ""

    def spawned() -> int:
        start = ["-m", "diffusion_trainer.apps.start", str(folder)]
        while (code := processes.spawn(start, count, folder / "logs", (lock,))) == processes.ROLLED_BACK:
            announce(config, size, folder, given)
        return code

    with folder_lock.held(folder) if first else nullcontext() as lock:
        if first:
            folders.write_config(folder, config)
            initial.write(folder, config["init_from"])
            announce(config, size, folder, given)
        if world is None:
            code = 0 if completion.nothing_left(config, folder, say=True) else spawned()
        else:
            from diffusion_trainer.apps.rank import work  # DeepSpeed and all: only where training happens

            if not first:
                folder_lock.wait_for_first_rank(folder)
            code = work(config, folder, world)
    if code == 0 and first:
        summarize(config, folder)
    if code == processes.ROLLED_BACK and first:
        print("Run the same command again to go on from the checkpoint before.", file=sys.stderr)
    return code


def preflight(config: dict[str, Any], world: int, folder: Path) -> str:
    """UserError for what can be known to fail before a process or a device is touched; what the run is given to begin
    with, in words.
    """
    check_secrets(config)
    sizes(config, world)
    allowed = config["allowed_targets"]
    built = {group: build(config[group], group, allowed) for group in CHECKED}
    if any(isinstance(c, EmaSnapshots) for c in built["callbacks"].values()) and not lengths(built["ema"]):
        raise UserError("ema_snapshots keeps averages that are power functions; train with ema=several or ema=power")
    if [*statistics.files(config["sampler"]), *statistics.files(config["variance"])]:
        raise UserError(
            "variance statistics are measured on a trained model: train with variance=beta_tilde and another sampler, "
            "run `diffusion-trainer variance checkpoint=...`, then choose variance=analytic or "
            "sampler=optimal_trajectory in sample and evaluate"
        )
    check_heartbeat(config, world)
    check_sampling(config, config["trainer"]["accelerator"])
    warn_of_signal(config)
    check_latents(config)
    folders.check(folder, config)
    data = build(config["data"], "data", allowed)
    check_data(config, data)
    for shape in data.image_shapes:
        check_network(config, shape)
    check_guidance(config, data.image_shape)
    check_pictures(config)
    if checkpoints.latest(folder / "checkpoints") is not None:
        folders.check_order(folder, data.fingerprint)
    given = initial.check(Parts.of(config, device="meta").model(torch.float32), config, folder)
    evaluation = build(config["evaluation"], "evaluation", allowed)
    if evaluation is not None:
        check_evaluation(config, data, evaluation)
    checkpoint = _newest(folder)
    if checkpoint is not None:
        checkpoint.check_architecture(parameter_shapes(config))
        if checkpoint.images_seen - config["batch_size"] >= config["num_images"]:
            raise UserError(f"{folder} is at {checkpoint.images_seen:,} images already; num_images is less")
    return given


def _newest(folder: Path) -> checkpoints.Checkpoint | None:
    """What the run goes on from, unless a checksum says later that it is damaged."""
    return resumable(folder / "checkpoints", Agreement(), thorough=False).checkpoint


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


def announce(config: dict[str, Any], count: int, folder: Path, given: str) -> None:
    newest = _newest(folder)
    at = f", resuming from {newest.folder.name}" if newest else ""
    million = sum(s.numel() for s in parameter_shapes(config).values()) / 1e6
    stage = config["strategy"].get("stage")
    how = f"ZeRO-{stage}" if stage else config["strategy"]["_target_"].rsplit(".", 1)[-1]
    device = build(config["trainer"], "trainer", config["allowed_targets"]).device()
    many = f"{count} {device} process{'es' if count > 1 else ''}"
    print(f"run {config['name']} in {folder}: {million:.2f} M parameters, {how} on {many}{at}", flush=True)
    if given and not newest:
        print(f"  {given}", flush=True)


def summarize(config: dict[str, Any], folder: Path) -> None:
    """What was made, where it is, how good it is, what to try next."""
    newest = checkpoints.latest(folder / "checkpoints")
    path = folder / "metrics.json"
    report = json.loads(path.read_text()) if path.is_file() else {"metrics": {}, "history": [{}]}
    seen = checkpoints.Checkpoint(newest).images_seen if newest else report.get("images_seen")
    quality, start = describe(report["metrics"]), report["history"][0]
    if start.get("images_seen") == 0 and "fid" in start:
        quality += f" (FID at the start: {start['fid']:.1f})"
    if quality and report["images_seen"] != seen:  # stopped, or killed, in the last one
        quality += f" at {report['images_seen']:,} images; for the last: diffusion-trainer evaluate checkpoint={folder}"
    logs = [name for name in ("metrics.csv", "wandb") if (folder / name).exists()]
    numbers = [f"{path} with their provenance"] if path.is_file() else []
    pictures = folder / "samples.png"
    labelled = build(config["conditioning"], "conditioning", config["allowed_targets"]).stand_in(1) is not None
    guided = " guidance.scale=2" if labelled and config["condition_dropout"] else ""
    lines = [
        f"done: {config['name']}, a diffusion model" + (f" after {seen:,} images" if seen else ""),
        f"  quality     {quality or f'not measured: diffusion-trainer evaluate checkpoint={folder} evaluation=...'}",
        f"  pictures    {pictures} (each evaluation's in {folder}/samples/)" if pictures.is_file() else "",
        f"  checkpoint  {newest}" if newest else "",
        f"  numbers     {', '.join(numbers + [f'{folder}/{name}' for name in logs])}",
        f"  config      {folder}/config.yaml; the same command resumes or, with a larger num_images, goes on",
        "try next",
        f"  diffusion-trainer sample checkpoint={folder} n=64 sampler=ddim{guided}",
        f"  diffusion-trainer evaluate checkpoint={folder} sampler.num_steps=50" if path.is_file() else "",
        "  diffusion-trainer train --help",
    ]
    print("\n" + "\n".join(line for line in lines if line))
