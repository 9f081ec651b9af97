"""How training draws t. Each returns (t, importance), both (B,): importance corrects the density to the uniform one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_trainer.conventions import Draws


class Timesteps(ABC):
    @abstractmethod
    def __call__(self, t_range: tuple[float, float], draws: Draws) -> tuple[Tensor, Tensor]:
        """t in t_range."""


@dataclass(frozen=True)
class Uniform(Timesteps):
    """t uniform and independent for each sample (Ho et al. 2020, algorithm 1, in continuous time)."""

    def __call__(self, t_range: tuple[float, float], draws: Draws) -> tuple[Tensor, Tensor]:
        return _scale(draws.uniform("timesteps"), t_range)


@dataclass(frozen=True)
class Stratified(Timesteps):
    """One t in each of `total` equal parts of the range, over the whole global batch, whatever the number of ranks.

    Each t is uniform in its part, so the batch mean of the loss is unbiased and its variance lower than that of
    independent draws (Kingma et al. 2021, appendix I.1, with an offset of its own for each sample).
    """

    def __call__(self, t_range: tuple[float, float], draws: Draws) -> tuple[Tensor, Tensor]:
        u = draws.uniform("timesteps")
        return _scale((draws.place.to(u) + u) / draws.total, t_range)


def _scale(u: Tensor, t_range: tuple[float, float]) -> tuple[Tensor, Tensor]:
    low, high = t_range
    return low + (high - low) * u, torch.ones_like(u)
