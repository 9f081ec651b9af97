"""Models that guide others, from checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.finished import loaded
from diffusion_trainer.apps.initial import checkpoint_in, run_of
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.sampling.guidance import WeakModel
from diffusion_trainer.training.checkpoints import Checkpoint


@dataclass(frozen=True)
class CheckpointModel(WeakModel):
    """A run (its newest checkpoint) or one checkpoint: of a smaller network, of an earlier time, or with another EMA.

    It reads x_t by its own schedule's levels, so it must have been trained on the same schedule.
    """

    checkpoint: str
    weights: Literal["ema", "raw"] = "ema"
    allowed_targets: tuple[str, ...] = ()

    def denoiser(self, device: torch.device) -> Denoiser:
        checkpoint = Checkpoint(checkpoint_in(Path(self.checkpoint), "guidance.weak.checkpoint"))
        config: Mapping[str, Any] = configuration.read(run_of(checkpoint.folder) / "config.yaml")
        config = {**config, "allowed_targets": list(self.allowed_targets)}
        parts, model = loaded(config, checkpoint, self.weights, device)
        return model.denoiser(parts.objective.schedule.frozen(), parts.objective.prediction)
