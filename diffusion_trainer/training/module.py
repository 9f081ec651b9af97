"""The Lightning module: encode, condition, objective. Everything else is a callback."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from diffusion_trainer.conventions import PassingError, UserError, seed_of
from diffusion_trainer.objectives.base import LossTerms, Objective
from diffusion_trainer.training.ema import Ema, EmaProfile, attach_ema
from diffusion_trainer.training.loss_scale import LossScale
from diffusion_trainer.training.model import Model
from diffusion_trainer.training.nonfinite import DecidesItself, NonFinite, spoiled
from diffusion_trainer.training.optimizers import AdamW
from diffusion_trainer.training.randomness import LaneDraws


@dataclass(frozen=True)
class Progress:
    """What the pure functions of progress need: seed, sizes in images, and the lanes of the randomness."""

    seed: int
    batch_size: int  # images of the global batch
    lanes: int
    num_images: int  # of the whole run


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1]; floating-point latents -> float32, as they are."""
    return images.float() if images.is_floating_point() else images.float() / 127.5 - 1


def to_pixels(x_0: Tensor) -> Tensor:
    """[-1, 1] -> uint8 pixels, as a file would hold them."""
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class DiffusionModule(LightningModule):
    """Trains a Model with an objective on batches of {image, [label], first} (see streaming.data)."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        optimizer: AdamW,
        ema: Ema,
        progress: Progress,
        condition_dropout: float,
    ):
        super().__init__()
        self.model, self.objective, self.optimizer_choice, self.ema = model, objective, optimizer, ema
        self.progress, self.condition_dropout = progress, condition_dropout
        self.images_seen = 0
        self.last_terms: LossTerms | None = None  # of the last micro-batch, for callbacks
        self.nonfinite: NonFinite | None = None
        self._clip_norm: float | None = None
        self._decided = False
        self.loss_scale = LossScale() if model.dtype == torch.float16 else None
        self.train()  # Lightning leaves modules in the mode that it finds them in

    def train(self, mode: bool = True) -> "DiffusionModule":
        """Modules whose parameters are all frozen stay in evaluation mode: they were trained with their dropout."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def setup(self, stage: str) -> None:
        self._clip_norm = self.trainer.gradient_clip_val
        self._decided = isinstance(self.trainer.strategy, DecidesItself)

    def on_before_batch_transfer(self, batch: Mapping, dataloader_idx: int) -> Mapping:
        if "error" not in batch:
            self.model.conditioning.check(batch)
        return batch

    def training_step(self, batch: Mapping, batch_idx: int) -> Tensor:
        p = self.progress
        draws = LaneDraws(p.seed, batch["first"], len(batch["image"]), p.batch_size, p.lanes, self.device)
        condition = self.model.conditioning.read(batch)
        dropped = draws.uniform("condition_dropout") < self.condition_dropout
        condition = self.model.conditioning.drop(condition, dropped)
        # Dropout inside the network knows only the global stream: exact after a restart, but a function of the layout.
        torch.manual_seed(seed_of(p.seed, "network", batch["first"]))
        terms = self.objective(self.model, to_unit(batch["image"]), condition, draws)
        self.last_terms = LossTerms(*(term.detach() for term in terms))
        loss = spoiled(terms.loss.mean())
        return self.loss_scale(loss) if self.loss_scale else loss

    def on_train_batch_start(self, batch: Mapping, batch_idx: int) -> None:
        if "error" in batch:  # here the callbacks have seen it
            raise (PassingError if batch["passing"] else UserError)(batch["error"])
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, optimizer_closure=None) -> None:
        self.nonfinite.forget()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # DeepSpeed accumulates by itself and is asked to step at every micro-batch.
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.images_seen += self.progress.batch_size
            if self.loss_scale:
                self.loss_scale.after_step(self.nonfinite.kept)

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Done where their norm is looked at."""

    @property
    def learning_rate(self) -> float:
        choice = self.optimizer_choice
        return choice.lr * choice.lr_schedule(self.images_seen, self.progress.num_images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer_choice.build(self.model)
        self.nonfinite = NonFinite(optimizer, self._clip_norm, self._decided)
        if self.loss_scale:
            self.loss_scale.attach(p for p in self.model.parameters() if p.requires_grad)
        attach_ema(optimizer, {k: partial(self._decay, track) for k, track in self.ema.tracks.items()}, self.nonfinite)
        return optimizer

    def _decay(self, track: EmaProfile) -> float:
        return track.decay(self.images_seen, self.progress.batch_size)
