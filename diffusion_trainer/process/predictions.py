"""What the network's raw output F means, as four coefficients of the denoised estimate (Karras et al. 2022, eq. 7)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from diffusion_trainer.conventions import expand


class Coefficients(NamedTuple):
    """x_0_hat = skip * x_t + out * F(into * x_t, noise); each of shape (B,)."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


class Prediction(ABC):
    """A prediction is its coefficients; target and estimate follow, here and nowhere else."""

    @abstractmethod
    def coefficients(self, alpha: Tensor, sigma: Tensor) -> Coefficients:
        """alpha, sigma: (B,)."""

    def target(self, x_0: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The F, (B, ...), that makes x_0_hat equal x_0."""
        return (x_0 - expand(c.skip, x_t) * x_t) / expand(c.out, x_t)

    def x_0_hat(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """(B, ...) from the network's output F, (B, ...)."""
        return expand(c.skip, x_t) * x_t + expand(c.out, x_t) * output.to(x_t.dtype)


@dataclass(frozen=True)
class Epsilon(Prediction):
    """F = eps_hat, so x_0_hat = (x_t - sigma eps_hat) / alpha (Ho et al. 2020, eq. 15).

    The network is told the noise level as log_snr / 4 (-2 times the c_noise of Karras et al. 2022, table 1, whose sigma
    is our sigma / alpha).
    """

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> Coefficients:
        return Coefficients(1 / alpha, -sigma / alpha, alpha.new_ones(alpha.shape), (alpha / sigma).log() / 2)
