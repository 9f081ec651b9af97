"""The trainer's settings, and Lightning's Trainer made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.strategies import Strategy


@dataclass(frozen=True)
class TrainerSettings:
    """accelerator auto takes the GPUs where there are any. processes null: one for each GPU of the node, two on a CPU
    (one where the strategy has only one). gradient_clip_norm null: no clipping.
    """

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_norm: float | None = None

    def __post_init__(self):
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be positive or null, not {self.processes}")
        if self.accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches must be positive, not {self.accumulate_grad_batches}")
        if self.gradient_clip_norm is not None and self.gradient_clip_norm <= 0:
            raise ValueError(f"gradient_clip_norm must be positive or null, not {self.gradient_clip_norm}")

    def device(self) -> str:
        """cpu or cuda; UserError if cuda is asked for and there is none."""
        if self.accelerator == "cuda" and not torch.cuda.is_available():
            raise UserError("trainer.accelerator=cuda: this machine has no CUDA device; use auto or cpu")
        return "cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu"

    def local_processes(self, strategy: Strategy) -> int:
        """How many processes a node runs; UserError if they cannot be had."""
        devices = torch.cuda.device_count() if self.device() == "cuda" else None
        count = self.processes or min(devices or 2, strategy.max_processes or devices or 2)
        if strategy.max_processes and count > strategy.max_processes:
            raise UserError(
                f"trainer.processes={count}: this strategy has {strategy.max_processes}; use strategy=ddp or zero2"
            )
        if devices is not None and count > devices:
            raise UserError(f"trainer.processes={count}: this node has {devices} GPUs")
        return count

    def build(
        self,
        strategy: Strategy,
        nodes: int,
        local_processes: int,
        environment: ClusterEnvironment,
        max_steps: int,
        callbacks: Sequence[Callback],
        loggers: Sequence[Logger],
        folder: Path,
    ) -> Trainer:
        device = self.device()
        trainer = Trainer(
            accelerator=device,
            devices=local_processes,
            num_nodes=nodes,
            strategy=strategy.lightning(device),
            plugins=[environment],
            max_steps=max_steps,
            max_epochs=-1,
            accumulate_grad_batches=self.accumulate_grad_batches,
            gradient_clip_val=self.gradient_clip_norm,
            callbacks=list(callbacks),
            logger=list(loggers),
            default_root_dir=folder,
            use_distributed_sampler=False,  # the batches know their rank
            enable_checkpointing=False,  # ours are whole or absent, and sharded
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        _leave_signals(trainer)
        return trainer


def _leave_signals(trainer: Trainer) -> None:
    """Signals are for callbacks.checkpointing alone."""
    # Lightning's handler of SIGTERM talks to the other ranks, at whatever instruction each of them is.
    trainer._signal_connector.register_signal_handlers = lambda: None
    # Before each step it would tell all ranks whether that came, and read the answer from the device.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def resume_counters(trainer: Trainer, steps: int) -> None:
    """Tells a new trainer that `steps` optimizer steps have been taken: its global_step, and when it ends."""
    step = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    step.total.ready = step.total.completed = steps
