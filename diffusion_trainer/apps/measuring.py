"""A trained model and its data, on the ranks that share the work of measuring one on the other."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_trainer.apps.finished import checkpoint_of, device_of, loaded
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.processes import agreeing
from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoints import Checkpoint


@dataclass(frozen=True)
class Measuring:
    """One rank's view of it."""

    agreement: Agreement
    checkpoint: Checkpoint
    conditioning: Conditioning
    denoiser: Denoiser
    schedule: Schedule
    data: ShardData
    device: torch.device


@contextmanager
def measuring(config: Mapping[str, Any]) -> Iterator[Measuring]:
    """Under torchrun or srun each rank has the whole model; the ranks talk to each other inside of the block alone."""
    data = build(config["data"], "data", config["allowed_targets"]).numbered()
    with agreeing() as agreement:
        checkpoint, device = checkpoint_of(config), device_of(config["accelerator"])
        parts, model = loaded(config, checkpoint, config["weights"], device)
        schedule = parts.objective.schedule.frozen()
        denoiser = model.denoiser(schedule, parts.objective.prediction)
        yield Measuring(agreement, checkpoint, parts.conditioning, denoiser, schedule, data, device)
