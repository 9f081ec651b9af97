"""Thresholding: x_0_hat is kept in the range of the data, [-1, 1], which strong guidance makes it leave."""

from dataclasses import dataclass
from math import floor, inf

import torch
from torch import Tensor

from diffusion_trainer.conventions import expand
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.variances import Estimate
from diffusion_trainer.sampling.guidance import Guidance, Guided


@dataclass(frozen=True)
class StaticThreshold(Guidance):
    """x_0_hat is clipped into [-bound, bound] (Saharia et al. 2022, section 2.3)."""

    bound: float = 1.0

    def __post_init__(self):
        if not 0 < self.bound < inf:
            raise ValueError(f"bound must be positive and finite, not {self.bound}")

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        return _Clipped(denoiser, self.bound)


@dataclass(frozen=True)
class _Clipped(Guided):
    bound: float

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        return self.inner(x_t, level, condition).clipped(self.bound)


@dataclass(frozen=True)
class DynamicThreshold(Guidance):
    """x_0_hat is clipped into [-s, s] and divided by s, s = max(1, quantile of its absolute values) for each sample
    (Saharia et al. 2022, section 2.3), so that what leaves [-1, 1] is pulled in rather than saturated.

    percentile: the share of values that are not clipped, in (0, 1].
    """

    percentile: float = 0.995

    def __post_init__(self):
        if not 0 < self.percentile <= 1:
            raise ValueError(f"percentile must lie in (0, 1], not {self.percentile}")

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        return _DynamicallyClipped(denoiser, self.percentile)


@dataclass(frozen=True)
class _DynamicallyClipped(Guided):
    percentile: float

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        x_0_hat, second = self.inner(x_t, level, condition)
        s = expand(quantile(x_0_hat.abs().flatten(1), self.percentile).clamp(min=1), x_0_hat)
        return Estimate(x_0_hat.clamp(-s, s) / s, second)


def quantile(values: Tensor, q: float) -> Tensor:
    """(B, N) -> (B,), interpolated linearly. torch.quantile's own sorts all of N, and refuses 2^24 numbers or more."""
    position = q * (values.shape[1] - 1)
    below = floor(position)
    largest = values.topk(values.shape[1] - below, sorted=True).values
    return torch.lerp(largest[:, -1], largest[:, -2:][:, 0], position - below)
