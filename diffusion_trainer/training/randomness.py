"""Randomness of training as a function of (seed, stream, step, lane), never of the rank.

A lane is a fixed part of the global batch. Whoever computes a lane draws the same numbers for it, so the loss curve
does not depend on how many processes compute it, and a resumed run needs no generator's state.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from diffusion_trainer.conventions import seed_of


@dataclass(frozen=True)
class LaneDraws:
    """Draws (see conventions) of samples number first..first+count-1 of the stream: whole lanes of one global batch."""

    seed: int
    first: int
    count: int
    batch_size: int
    lanes: int
    device: torch.device

    def __post_init__(self):
        size = self.batch_size // self.lanes
        if self.batch_size % self.lanes or self.first % size or self.count % size:
            raise ValueError(f"{self.count} samples from {self.first} are not whole lanes of {size} samples")

    @property
    def total(self) -> int:
        return self.batch_size

    @property
    def place(self) -> Tensor:
        start = self.first % self.batch_size
        return torch.arange(start, start + self.count, device=self.device)

    def uniform(self, stream: str) -> Tensor:
        return self._draw(stream, lambda n, g: torch.rand(n, generator=g, device=self.device))

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        return self._draw(stream, lambda n, g: torch.randn(n, *shape, generator=g, device=self.device))

    def _draw(self, stream: str, draw: Callable[[int, Generator], Tensor]) -> Tensor:
        step, start = divmod(self.first, self.batch_size)
        size = self.batch_size // self.lanes
        lanes = range(start // size, (start + self.count) // size)
        seeds = [seed_of(self.seed, stream, step, lane) for lane in lanes]
        return torch.cat([draw(size, Generator(self.device).manual_seed(s)) for s in seeds])
