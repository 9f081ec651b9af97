"""Randomness of sampling: sample i is a function of (seed, i), whatever the batch, the rank and the world."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from diffusion_trainer.conventions import seed_of


@dataclass(frozen=True)
class SampleNoise:
    """One generator for each sample, on the CPU, so that a GPU draws the same numbers. Calls walk along its stream."""

    seed: int
    samples: Sequence[int]  # the numbers of the samples
    shape: tuple[int, ...]  # of one sample
    device: torch.device
    _generators: list[Generator] = field(init=False, repr=False)

    def __post_init__(self):
        generators = [Generator().manual_seed(seed_of(self.seed, "sample", i)) for i in self.samples]
        object.__setattr__(self, "_generators", generators)

    def __call__(self) -> Tensor:
        """(len(samples), *shape), standard normal, float32."""
        drawn = torch.stack([torch.randn(self.shape, generator=g) for g in self._generators])
        # From pinned memory the copy is queued: the host draws the next noise while the device works.
        drawn = drawn.pin_memory() if self.device.type == "cuda" else drawn
        return drawn.to(self.device, non_blocking=True)
