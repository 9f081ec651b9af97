"""log p(x_0 | x at the cleanest time): the last term of the variational bound."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf, log, pi

import torch
from torch import Tensor
from torch.special import log_ndtr


class Decoder(ABC):
    @abstractmethod
    def __call__(self, x_0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """(B,), nats. x_0, mean: (B, ...) float64; variance broadcasts to them."""


@dataclass(frozen=True)
class DiscretizedGaussian(Decoder):
    """The mass of the normal within the bin of x_0, open at the two ends (Ho et al. 2020, eq. 13).

    x_0 is one of `levels` equally spaced numbers from -1 to 1: 256 for 8-bit pixels.
    """

    levels: int = 256

    def __post_init__(self):
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2, not {self.levels}")

    def __call__(self, x_0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return self._log_mass(x_0, mean, variance).flatten(1).sum(1)

    def expected_cost(self, variance: Tensor) -> Tensor:
        """(...,) nats: the mean of -log mass over x_0 - mean ~ N(0, variance), for an x_0 away from the two ends.

        log(2 pi e variance) / 2 less the log of the bin where the bin is narrow beside it, and 0 where it is wide.
        """
        z = torch.linspace(-8, 8, 129, dtype=variance.dtype, device=variance.device)
        weight = (-(z**2) / 2).exp()  # equal steps: exact to rounding for what is smooth and vanishes at both ends
        log_mass = self._log_mass(torch.zeros_like(z), z * variance[..., None].sqrt(), variance[..., None])
        return -(log_mass * weight).sum(-1) / weight.sum()

    def _log_mass(self, x_0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        half = 1 / (self.levels - 1)
        std = variance.sqrt()
        low = torch.where(x_0 < -1 + half, -inf, (x_0 - half - mean) / std)
        high = torch.where(x_0 > 1 - half, inf, (x_0 + half - mean) / std)
        # By symmetry both to the left of 0, where log_ndtr keeps its digits however far out.
        right = low + high > 0
        low, high = torch.where(right, -high, low), torch.where(right, -low, high)
        return log_ndtr(high) + (-(log_ndtr(low) - log_ndtr(high)).expm1()).log()


@dataclass(frozen=True)
class GaussianDensity(Decoder):
    """The density of the normal: for x_0 that is real-valued. On pixels it gives a density, not a probability."""

    def __call__(self, x_0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return -(((x_0 - mean) ** 2 / variance + variance.log() + log(2 * pi)) / 2).flatten(1).sum(1)
