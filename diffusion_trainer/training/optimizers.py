"""Optimizers, and learning rates as pure functions of images seen."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import nn


class LrSchedule(ABC):
    @abstractmethod
    def __call__(self, images_seen: int, num_images: int) -> float:
        """Factor of the base rate after `images_seen` of `num_images` images."""


@dataclass(frozen=True)
class Constant(LrSchedule):
    """Linear warm-up, then the base rate."""

    warmup_images: int = 0

    def __call__(self, images_seen: int, num_images: int) -> float:
        return min(1.0, images_seen / self.warmup_images) if self.warmup_images else 1.0


@dataclass(frozen=True)
class CosineDecay(LrSchedule):
    """Linear warm-up, then half a cosine down to `final` of the base rate (Loshchilov and Hutter 2017, eq. 5)."""

    warmup_images: int = 0
    final: float = 0.0

    def __post_init__(self):
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must lie in [0, 1], not {self.final}")

    def __call__(self, images_seen: int, num_images: int) -> float:
        if images_seen < self.warmup_images:
            return images_seen / self.warmup_images
        progress = min(1.0, (images_seen - self.warmup_images) / max(1, num_images - self.warmup_images))
        return self.final + (1 - self.final) * (1 + cos(pi * progress)) / 2


@dataclass(frozen=True)
class AdamW:
    """torch's fused AdamW; weights of two or more dimensions decay, biases and norms do not."""

    lr: float
    lr_schedule: LrSchedule
    betas: Sequence[float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self):
        if not (self.lr > 0 and self.weight_decay >= 0 and self.eps > 0):  # also refuses nan
            raise ValueError("lr and eps must be positive, weight_decay not negative")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), not {list(self.betas)}")

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        return torch.optim.AdamW(groups, lr=self.lr, betas=tuple(self.betas), eps=self.eps, fused=True)
