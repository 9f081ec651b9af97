"""From 8-bit pixels to real numbers within their bins, so that a density bounds the probability of the pixels.

log P(pixels) = log of the integral of p over the bin >= E_q[log p(x_0) - log q(x_0)] for any q on the bin (Theis et al.
2016, section 3.1 for a uniform q; Ho et al. 2019, Flow++, eq. 12 for any). Pixel k lies at k / 127.5 - 1, in a bin of
width 2/255; the first and the last bin reach as far beyond -1 and 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import log, pi
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.special import erf, ndtr, ndtri

from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level

HALF_BIN = 1 / 255


def centres(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float64 in [-1, 1]. ValueError for another dtype."""
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, 0 to 255, not {pixels.dtype}")
    return pixels.double() / 127.5 - 1


@dataclass(frozen=True)
class CleanEnd:
    """The level, of floats, at which a density is asked for, and what the model says there."""

    level: Level
    denoiser: Denoiser
    condition: Tensor | None = None

    @property
    def scale(self) -> float:
        """The standard deviation of its noise, in units of x_0."""
        return self.level.sigma / self.level.alpha

    @torch.no_grad()
    def pull(self, x_0: Tensor, dtype: torch.dtype) -> Tensor:
        """x_0: (B, ...), handed to the denoiser in `dtype` as x_t = alpha x_0 -> x_0_hat - x_0, float64.

        Over scale^2 it is the score of x_0 (Tweedie's formula, of x_t / alpha = x_0 + scale eps).
        """
        x = (self.level.alpha * x_0).to(dtype)
        # Less x as it was rounded, not x_0: the network has not seen the difference, and scale^2 is small.
        return self.denoiser(x, self.level, self.condition).x_0_hat.double() - x.double() / self.level.alpha


class Dequantization(ABC):
    @property
    def num_images(self) -> int:
        """On how many images it must be fitted before it is used, at most; 0: it is not."""
        return 0

    def fitted(self, clean: CleanEnd, pixels: Tensor, seed: int) -> "Dequantization":
        """What is used, a function of the arguments alone. pixels: (N, ...) uint8, N up to num_images, whose
        conditions `clean` has.
        """
        return self

    @property
    def learned(self) -> Mapping[str, Any]:
        """What it was fitted to be, and on what, for a report: numbers and lists of them."""
        return {}

    @abstractmethod
    def __call__(self, pixels: Tensor, clean: CleanEnd, normal: Tensor) -> tuple[Tensor, Tensor]:
        """pixels: (B, ...) uint8, whose conditions `clean` has; normal: (B, ...), standard normal, the only randomness
        -> x_0 (B, ...), the dtype of `normal`; log q(x_0 | pixels) (B,), float64, in nats.
        """


class CutNormal(NamedTuple):
    """A normal cut to the bin, which is [-1, 1] in its units of half a bin: float64, of any one shape.

    Exact while the bin begins within some eight scales of the location.
    """

    location: Tensor
    scale: Tensor

    def quantile(self, normal: Tensor) -> Tensor:
        """What is to this law as `normal` is to N(0, 1)."""
        low, mass = self._cut
        offset = self.location + self.scale * ndtri(ndtr(low) + mass * ndtr(normal))
        return offset.clamp(-1, 1)  # only rounding can lead out of the bin

    def log_density(self, offset: Tensor) -> Tensor:
        """In x_0's units, of each entry."""
        square = ((offset - self.location) / self.scale) ** 2
        return -square / 2 - (HALF_BIN * self.scale * self._cut[1]).log() - log(2 * pi) / 2

    @property
    def _cut(self) -> tuple[Tensor, Tensor]:
        low, high = (-1 - self.location) / self.scale, (1 - self.location) / self.scale
        return low, (erf(high / 2**0.5) - erf(low / 2**0.5)) / 2  # of a normal that is wide beside the bin as well


@dataclass(frozen=True)
class UniformDequantization(Dequantization):
    """q is uniform on the bin: log q = log 127.5 per dimension."""

    def __call__(self, pixels: Tensor, clean: CleanEnd, normal: Tensor) -> tuple[Tensor, Tensor]:
        x_0 = centres(pixels) + HALF_BIN * (2 * ndtr(normal.double()) - 1)
        log_q = x_0.new_full((len(x_0),), -pixels[0].numel() * log(2 * HALF_BIN))
        return x_0.to(normal.dtype), log_q


@dataclass(frozen=True)
class TruncatedNormalDequantization(Dequantization):
    """q is a normal around the pixel, of standard deviation `scale` before it is cut to the bin (Zheng et al. 2023,
    section 4.1).

    scale null is sigma / alpha of the clean level: but for the cut, what the network saw there in training.
    """

    scale: float | None = None

    def __post_init__(self):
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale must be positive or null, not {self.scale}")

    def __call__(self, pixels: Tensor, clean: CleanEnd, normal: Tensor) -> tuple[Tensor, Tensor]:
        middle = centres(pixels)
        scale = torch.full_like(middle, (clean.scale if self.scale is None else self.scale) / HALF_BIN)
        law = CutNormal(torch.zeros_like(middle), scale)
        offset = law.quantile(normal.double())
        return (middle + HALF_BIN * offset).to(normal.dtype), law.log_density(offset).flatten(1).sum(1)
