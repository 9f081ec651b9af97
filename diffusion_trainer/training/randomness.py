"""Randomness of training as a function of (seed, stream, step, lane), never of the rank.

A lane is a fixed part of the global batch: of L lanes, lane l has the places l, l + L, l + 2 L, ... (the data's order
has the same lanes). Whoever computes a lane draws the same numbers for it, so the loss curve does not depend on how
many processes compute it, and a resumed run needs no generator's state.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from diffusion_trainer.conventions import seed_of


@dataclass(frozen=True)
class LaneDraws:
    """Draws (see conventions) of one piece of a global batch: of P pieces of `count` samples each, the one that begins
    at sample number `first` and has every P-th from there on. A piece is made of whole lanes.
    """

    seed: int
    first: int
    count: int
    batch_size: int
    lanes: int
    device: torch.device

    def __post_init__(self):
        if self.batch_size % self.lanes or self.batch_size % self.count or self.lanes % self.pieces:
            raise ValueError(
                f"a piece of {self.count} samples of a batch of {self.batch_size} is not made of whole lanes "
                f"({self.lanes} lanes)"
            )
        if self.first % self.batch_size >= self.pieces:
            raise ValueError(f"no piece of {self.count} samples of {self.batch_size} begins at number {self.first}")

    @property
    def pieces(self) -> int:
        return self.batch_size // self.count

    @property
    def total(self) -> int:
        return self.batch_size

    @property
    def place(self) -> Tensor:
        return torch.arange(self.first % self.batch_size, self.batch_size, self.pieces, device=self.device)

    def uniform(self, stream: str) -> Tensor:
        return self._draw(stream, lambda n, g: torch.rand(n, generator=g, device=self.device))

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        return self._draw(stream, lambda n, g: torch.randn(n, *shape, generator=g, device=self.device))

    def _draw(self, stream: str, draw: Callable[[int, Generator], Tensor]) -> Tensor:
        step, start = divmod(self.first, self.batch_size)
        seeds = [seed_of(self.seed, stream, step, lane) for lane in range(start, self.lanes, self.pieces)]
        size = self.batch_size // self.lanes
        by_lane = [draw(size, Generator(self.device).manual_seed(s)) for s in seeds]
        return torch.stack(by_lane, 1).flatten(0, 1)  # the lanes take turns
