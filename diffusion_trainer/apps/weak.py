"""Models that guide others, from checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.finished import loaded
from diffusion_trainer.apps.initial import checkpoint_in, run_of
from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.denoiser import MAX_KNOWN, Denoiser
from diffusion_trainer.process.levels import Level, level_of_log_snr
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import Estimate
from diffusion_trainer.sampling.guidance import Guided, WeakModel
from diffusion_trainer.training.checkpoints import Checkpoint


@dataclass(frozen=True)
class CheckpointModel(WeakModel):
    """A run (its newest checkpoint) or one checkpoint: of a smaller network, of an earlier time, or with another EMA.

    Its schedule may be another than that of the model which it guides (see `OnItsSchedule`).
    """

    checkpoint: str
    weights: str = "ema"  # or raw, or the name of one of its averages
    allowed_targets: tuple[str, ...] = ()

    def denoiser(self, device: torch.device) -> Denoiser:
        checkpoint = Checkpoint(checkpoint_in(Path(self.checkpoint), "guidance.weak.checkpoint"))
        config: Mapping[str, Any] = configuration.read(run_of(checkpoint.folder) / "config.yaml")
        config = {**config, "allowed_targets": list(self.allowed_targets)}
        parts, model = loaded(config, checkpoint, self.weights, device)
        schedule = parts.objective.schedule.frozen()
        denoiser = OnItsSchedule(model.denoiser(schedule, parts.objective.prediction), schedule)
        return Conditional(denoiser, self.checkpoint) if parts.conditioning.fields else denoiser


@dataclass(frozen=True)
class Conditional(Guided):
    """A model that must be told a condition; UserError when the one that it guides has none to pass on."""

    checkpoint: str

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        if condition is None:
            raise UserError(
                f"guidance.weak.checkpoint={self.checkpoint} was trained with labels, and the model that it is to "
                "guide has none to tell it; take a weak model of conditioning=none, or guide a model that has labels"
            )
        return self.inner(x_t, level, condition)


@dataclass(frozen=True)
class OnItsSchedule(Guided):
    """A denoiser asked at any schedule's levels: at the same SNR x_t / alpha has the same law on all schedules.

    So it is shown x_t in the scale of its own schedule at that SNR, within its own range.
    """

    schedule: Schedule
    _known: dict[Level, tuple[Level, float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        own, scale = self._known.get(level) or self._learned(level)
        return self.inner(x_t if own == level else scale * x_t, own, condition)

    def prepare(self, levels: Sequence[Level], device: torch.device) -> None:
        self.inner.prepare([(self._known.get(level) or self._learned(level))[0] for level in levels], device)

    def _learned(self, level: Level) -> tuple[Level, float]:
        if len(self._known) == MAX_KNOWN:
            self._known.clear()
        self._known[level] = self._own(level)
        return self._known[level]

    def _own(self, level: Level) -> tuple[Level, float]:
        """The level, and the factor of x_t. Noisier than its own range, x_t is nearly noise: sigma sets its scale."""
        if level == (same := self.schedule.level_at(level.t)):
            return same, 1.0
        low, high = self.schedule.t_range
        own = level_of_log_snr(self.schedule, level.log_snr) if level.alpha else None
        if own is None or own.t > high:
            own = self.schedule.at_noisy_end
            return own, own.sigma / level.sigma
        own = own if own.t >= low else self.schedule.level_at(low)
        return own, own.alpha / level.alpha
