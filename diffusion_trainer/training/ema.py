"""Exponential moving average of the weights, kept as optimizer state: sharded, saved and offloaded like Adam's moments.

The hooks act on whatever fp32 tensors the optimizer steps. Under ZeRO these are this rank's flat partitions of the
master weights; so the average needs no communication and 4 bytes a parameter over all ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

KEY = "ema"  # in the optimizer's state of each parameter


class EmaProfile(ABC):
    @abstractmethod
    def decay(self, images_seen: int, batch_size: int) -> float:
        """Factor of the old average at the step that takes `images_seen` to `images_seen + batch_size`."""


@dataclass(frozen=True)
class HalfLife(EmaProfile):
    """Weights of `half_life_images` ago count half. Early on the half-life is a fraction of the images seen.

    Karras et al. 2024 (EDM2's code for EDM): half-life = min(half_life_images, ramp_up_ratio * images seen).
    """

    half_life_images: int
    ramp_up_ratio: float = 0.05

    def __post_init__(self):
        if self.half_life_images <= 0 or self.ramp_up_ratio <= 0:
            raise ValueError("half_life_images and ramp_up_ratio must be positive")

    def decay(self, images_seen: int, batch_size: int) -> float:
        half_life = min(self.half_life_images, self.ramp_up_ratio * (images_seen + batch_size))
        return 0.5 ** (batch_size / half_life)


@dataclass(frozen=True)
class ConstantDecay(EmaProfile):
    """The same factor at every step, starting from the initial weights."""

    rate: float

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must lie in [0, 1), not {self.rate}")

    def decay(self, images_seen: int, batch_size: int) -> float:
        return self.rate


def attach_ema(optimizer: Optimizer, decay: Callable[[], float]) -> None:
    """Keeps state[p]["ema"] of every parameter p of the optimizer; decay() is asked at each of its steps.

    ZeRO calls step() once for each parameter group with the others emptied, so nothing is counted per call.
    """
    initial: dict[torch.Tensor, torch.Tensor] = {}

    def before(optimizer: Optimizer, args, kwargs) -> None:
        for p in _parameters(optimizer):
            # Not yet into the state: Adam initializes its own only where the state is empty.
            if KEY not in optimizer.state.get(p, {}):
                initial[p] = p.detach().clone()

    @torch.no_grad()
    def after(optimizer: Optimizer, args, kwargs) -> None:
        stepped = [p for p in _parameters(optimizer) if p.grad is not None]
        for p in stepped:
            if KEY not in optimizer.state[p]:
                optimizer.state[p][KEY] = initial.pop(p)
        if stepped:
            averages = [optimizer.state[p][KEY] for p in stepped]
            torch._foreach_lerp_(averages, [p.detach() for p in stepped], 1 - decay())
        initial.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
