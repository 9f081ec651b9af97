"""Guidance: from a denoiser to a denoiser, so that they nest and every solver has all of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_trainer.process.denoiser import Denoiser


class Guidance(ABC):
    @abstractmethod
    def __call__(self, denoiser: Denoiser) -> Denoiser: ...


@dataclass(frozen=True)
class NoGuidance(Guidance):
    """The denoiser itself."""

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        return denoiser


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """x_0_hat(null) + scale (x_0_hat(condition) - x_0_hat(null)), Ho and Salimans 2022, eq. 6 with scale = 1 + w.

    Scale 1 is the identity and costs nothing; 0 is unconditional; above 1 trades diversity for fidelity.
    """

    scale: float = 1.0

    def __post_init__(self):
        if not self.scale >= 0:  # also refuses nan
            raise ValueError(f"scale must not be negative, not {self.scale}")

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        return denoiser if self.scale == 1 else _ClassifierFreeDenoiser(denoiser, self.scale)


@dataclass(frozen=True)
class _ClassifierFreeDenoiser(Denoiser):
    inner: Denoiser
    scale: float

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        null = None if condition is None else self.null(condition)
        if null is None:  # nothing to guide by: both estimates are the same
            return self.inner(x_t, t, condition)
        both = torch.cat([condition, null])  # one call of twice the batch, not two
        with_condition, without = self.inner(x_t.repeat(2, *[1] * (x_t.dim() - 1)), t.repeat(2), both).chunk(2)
        return without + self.scale * (with_condition - without)

    def null(self, condition: Tensor | None) -> Tensor | None:
        return self.inner.null(condition)
