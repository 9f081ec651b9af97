"""One rank of a training run."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import distributed

import diffusion_trainer
from diffusion_trainer.apps import completion, initial, post_mortem, processes
from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import Parts, dtype_of, generator_of
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks.attempts import Start, printing
from diffusion_trainer.callbacks.damage import CountDamage
from diffusion_trainer.callbacks.observing import Observing
from diffusion_trainer.callbacks.redaction import redacted
from diffusion_trainer.callbacks.run import Run, RunCallback, in_turn
from diffusion_trainer.callbacks.scaling import Scaling
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import needed
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.looking_ahead import LookingAhead
from diffusion_trainer.training import checkpoints
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.module import DiffusionModule, Progress
from diffusion_trainer.training.resuming import put_aside, resumable
from diffusion_trainer.training.rollbacks import Rollbacks, left_out
from diffusion_trainer.training.trainer import resume_counters


def work(config: Mapping[str, Any], folder: Path, world: World) -> int:
    """Trains; the exit code. What it prints, and what it fails with, is in the folder's logs, too."""
    quiet()
    if completion.nothing_left(config, folder, world.rank == 0):
        return 0
    logs = folder / post_mortem.LOGS
    with printing() as log, post_mortem.recorded(logs, world.rank, world.size):
        start = Start(log, logs, world.rank)
        start.begin()
        return _train(config, folder, world, start)


def _train(config: Mapping[str, Any], folder: Path, world: World, start: Start) -> int:
    progress = progress_of(config)
    trainer_settings, strategy = (
        build(config["trainer"], "trainer", config["allowed_targets"]),
        build(config["strategy"], "strategy", config["allowed_targets"]),
    )
    module = module_of(config, progress, trainer_settings.device())
    data = build(config["data"], "data", config["allowed_targets"])
    callbacks = in_turn([
        CountDamage(data.damage_budget, data.count),
        *([Scaling()] if module.loss_scale else []),
        *([Observing()] if module.objective.observes else []),
        *completion.callbacks_of(config),
    ])  # fmt: skip
    if world.rank == 0:
        folders.write_order(folder, data.fingerprint)
    begin = _Begin(config, folder, module, strategy, callbacks, start)
    trainer = trainer_settings.build(
        strategy, world.nodes, world.local_size, world.environment(), progress.num_images // progress.batch_size,
        [begin, *callbacks, _End(begin)], [], folder,
    )  # fmt: skip
    layout = Layout(progress.batch_size, world.size, world.rank, trainer_settings.accumulate_grad_batches)

    def loader() -> Any:
        first, last = ((n + begin.left_out) // progress.batch_size for n in (begin.started_at, progress.num_images))
        loader = data.loader(layout, progress.seed, progress.lanes, first, last)
        return LookingAhead(loader, layout.micro_batches)

    trainer.fit(module, datamodule=_Data(loader))
    for callback in callbacks:
        if isinstance(callback, RunCallback):
            callback.close()
    return begin.exit_code()


def progress_of(config: Mapping[str, Any]) -> Progress:
    """num_images is rounded up to whole global batches."""
    steps = -(-config["num_images"] // config["batch_size"])
    return Progress(config["seed"], config["batch_size"], config["lanes"], steps * config["batch_size"])


def module_of(config: Mapping[str, Any], progress: Progress, device: str) -> DiffusionModule:
    """Without the weights of `init_from`."""
    allowed = config["allowed_targets"]
    parts = Parts.of(config, config["seed"])
    model = parts.model(dtype_of(config["precision"], device))
    optimizer, ema = (build(config[name], name, allowed) for name in ("optimizer", "ema"))
    return DiffusionModule(model, parts.objective, optimizer, ema, progress, config["condition_dropout"])


def loggers_of(config: Mapping[str, Any], folder: Path, run_id: str, started_at: int) -> list:
    choices = [
        build(node, f"logger.{name}", config["allowed_targets"])
        for name, node in config["logger"].items()
        if node is not None
    ]
    return [choice.build(folder, config["name"], run_id, config, started_at) for choice in choices]


class _Data(LightningDataModule):
    """A loader that is made only when it is known where the run goes on."""

    def __init__(self, loader: Callable[[], Any]):
        super().__init__()
        self._loader = loader

    def train_dataloader(self) -> Any:
        return self._loader()


class _Begin(Callback):
    """First of the callbacks: once ranks can talk, finds what to begin with and to go on from; once the strategy
    stands, resumes the weights and gives the others their run.
    """

    def __init__(self, config, folder, module, strategy, callbacks: Sequence[Callback], start: Start):
        self.config, self.folder, self.module, self.strategy, self.begun = config, folder, module, strategy, start
        self.callbacks = callbacks
        self.checkpoint: checkpoints.Checkpoint | None = None
        self.run: Run | None = None

    @property
    def started_at(self) -> int:
        return self.checkpoint.images_seen if self.checkpoint else 0

    def setup(self, trainer: Trainer, module: DiffusionModule, stage: str) -> None:
        self.agreement = Agreement(self.strategy.timeout_seconds)
        first = self.agreement.rank == 0
        self.begun.meet(self.agreement, self.callbacks)
        # Not before: rank 0 has written them, and may have begun later than others.
        initial.apply(module.model, initial.read(self.folder), self.config["init_from"])
        found = resumable(self.folder / "checkpoints", self.agreement)
        self.checkpoint = found.checkpoint
        for problem, damaged in zip(found.damage, found.damaged, strict=True):
            if first:
                aside = put_aside(damaged)
                at = self.checkpoint.folder.name
                print(f"  WARNING: {problem}\n  It is {aside.name} now; going on from {at}, the one before", flush=True)
        if first:
            rollbacks = Rollbacks(self.folder)
            with needed(rollbacks.path, "and what the run has left out is another from here on"):
                rollbacks.forget_after(self.started_at)
        self.left_out = left_out(self.folder, self.started_at, self.agreement)
        resume_counters(trainer, self.started_at // module.progress.batch_size)
        if first:
            saved = self.checkpoint.manifest["state"]["run_id"] if self.checkpoint else None
            run_id = folders.run_id(self.folder, saved)
            trainer.loggers = loggers_of(self.config, self.folder, run_id, self.started_at)

    def on_fit_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Where no step is left Lightning leaves out its loop, and with it the hooks where callbacks begin and end."""
        if self.checkpoint is None or self.checkpoint.images_seen < module.progress.num_images:
            return
        self.on_train_start(trainer, module)
        for callback in self.callbacks:
            callback.on_train_start(trainer, module)
        for callback in self.callbacks:
            callback.on_train_end(trainer, module)

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        config, device = self.config, module.device
        agreement = self.agreement
        sharding = self.strategy.sharding(module.model, trainer)
        state: dict[str, Any] = {"run_id": folders.run_id(self.folder) if agreement.rank == 0 else None}
        if self.checkpoint is not None:
            checkpoints.load(self.checkpoint, sharding)
            module.images_seen, state = self.checkpoint.images_seen, self.checkpoint.manifest["state"]
        evaluation = build(config["evaluation"], "evaluation", config["allowed_targets"])
        seed = evaluation.seed if evaluation else config["seed"]
        generator = partial(generator_of, config, module.model, module.objective, device, seed)
        state["provenance"] = provenance(config, str(device))
        prepared = evaluation.prepare(device, agreement, module.model.conditioning) if evaluation else None
        self.run = Run(
            self.folder, module, trainer, agreement, sharding, generator, prepared, state, module.images_seen
        )
        for callback in self.callbacks:
            callback.run = self.run

    def exit_code(self) -> int:
        run = self.run
        if run is None:
            return 0
        if run.stop_signal is None:  # a stop in the same step comes first: the disk has gone back already
            return processes.ROLLED_BACK if run.rolled_back else 0
        saved = "" if run.saved_at == run.images_seen else f", {run.saved_at:,} of them saved"
        run.say(f"  stopped at {run.images_seen:,} images{saved}; run the same command again to go on from there")
        return 128 + run.stop_signal


class _End(Callback):
    """Last of the callbacks: raises what has kept the run from its end, once all others have had their turn there."""

    def __init__(self, begun: _Begin):
        self.begun = begun

    def on_train_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        if self.begun.run.failure is not None:
            raise self.begun.run.failure


def provenance(config: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What a number measured in this run must carry besides the evaluation's own."""
    return {
        "sampler": config["sampler"],
        "variance": config["variance"],
        "guidance": config["guidance"],
        "ema": config["ema"],
        **{name: config[name] for name in ("precision", "compile", "channels_last")},
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()}-core CPU",
        "versions": {
            "diffusion_trainer": diffusion_trainer.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
    }


def quiet() -> None:
    """What the libraries say to their own developers is not for the person who watches."""
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|deepspeed|torch.jit|torchmetrics")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*")  # DeepSpeed's calls
    # DDP's buckets are contiguous, gradients of 1x1 convolutions channels-last: a copy of some kilobytes.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def main() -> int:
    """With the folder as the only argument, as the parent starts it; the exit code."""
    folder = Path(sys.argv[1])
    try:
        code = work(configuration.read(folder / "config.yaml"), folder, processes.current())
        if distributed.is_initialized():
            distributed.destroy_process_group()
        return code
    except UserError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return error.exit_code
