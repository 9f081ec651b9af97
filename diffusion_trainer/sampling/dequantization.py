"""From 8-bit pixels to real numbers within their bins, so that a density bounds the probability of the pixels.

log P(pixels) = log of the integral of p over the bin >= E_q[log p(x_0) - log q(x_0)] for any q on the bin (Theis et al.
2016, section 3.1 for a uniform q; Ho et al. 2019, Flow++, eq. 12 for any). Pixel k lies at k / 127.5 - 1, in a bin of
width 2/255; the first and the last bin reach as far beyond -1 and 1.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import erf, log, pi

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from diffusion_trainer.process.levels import Level

HALF_BIN = 1 / 255


def centres(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float64 in [-1, 1]. ValueError for another dtype."""
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, 0 to 255, not {pixels.dtype}")
    return pixels.double() / 127.5 - 1


class Dequantization(ABC):
    @abstractmethod
    def __call__(self, pixels: Tensor, clean: Level, normal: Tensor) -> tuple[Tensor, Tensor]:
        """pixels: (B, ...) uint8; clean: the level, of floats, at which the density is asked for; normal: (B, ...),
        standard normal, the only randomness -> x_0 (B, ...), the dtype of `normal`; log q(x_0 | pixels) (B,), float64,
        in nats.
        """


@dataclass(frozen=True)
class UniformDequantization(Dequantization):
    """q is uniform on the bin: log q = log 127.5 per dimension."""

    def __call__(self, pixels: Tensor, clean: Level, normal: Tensor) -> tuple[Tensor, Tensor]:
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

    def __call__(self, pixels: Tensor, clean: Level, normal: Tensor) -> tuple[Tensor, Tensor]:
        scale = clean.sigma / clean.alpha if self.scale is None else self.scale
        mass = erf(HALF_BIN / scale / 2**0.5)  # of the normal within the bin
        quantile = (1 - mass) / 2 + mass * ndtr(normal.double())
        offset = (scale * ndtri(quantile)).clamp(-HALF_BIN, HALF_BIN)  # only rounding can lead out of the bin
        each = -((offset / scale) ** 2) / 2 - log(scale * mass) - log(2 * pi) / 2
        return (centres(pixels) + offset).to(normal.dtype), each.flatten(1).sum(1)
