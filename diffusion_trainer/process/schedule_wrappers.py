"""Schedules made of another one: shifted for a resolution, or rescaled to end in pure noise."""

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_trainer.process.schedules import Schedule


@dataclass(frozen=True)
class Shifted(Schedule):
    """sigma / alpha is `shift` times that of `base` at each t: base at a later time, so what it preserves stays so.

    Averaging d^2 equal neighbours divides the noise by d, so images d times as wide take shift = d for the same look
    of their coarse structure: log-SNR + 2 log(64 / width), that is shift = width / 64 (Hoogeboom et al. 2023, section
    3.1). On `RectifiedFlow` it is the timestep shift of Esser et al. 2024, eq. 23. Computed in float64.
    """

    base: Schedule
    shift: float

    def __post_init__(self):
        if not self.shift > 0:
            raise ValueError(f"shift must be positive (1 changes nothing), not {self.shift}")
        _refuse_learned(self.base)

    @property
    def variance_preserving(self) -> bool:
        return self.base.variance_preserving

    @property
    def t_range(self) -> tuple[float, float]:
        return self.base.t_range

    def log_snr(self, t: Tensor) -> Tensor:
        return self.base.log_snr(t) - 2 * log(self.shift)

    def _base_t(self, t: Tensor) -> Tensor:
        return self.base.t_of_log_snr(self.log_snr(t.double()))

    def alpha(self, t: Tensor) -> Tensor:
        return self.base.alpha(self._base_t(t)).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return self.base.sigma(self._base_t(t)).to(t.dtype)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.base.t_of_log_snr(log_snr + 2 * log(self.shift))


@dataclass(frozen=True)
class ZeroTerminalSNR(Schedule):
    """alpha' = (alpha - alpha(t_max)) / (1 - alpha(t_max)), exactly 0 at the noisy end (Lin et al. 2024, algorithm 1).

    Variance preserving, as `base` must be. Lin et al. leave the first step's alpha as it is, we that of t = 0. An
    epsilon-predictor says nothing about x_0 at the noisy end: predict v or x_0. Computed in float64.
    """

    variance_preserving: ClassVar[bool] = True
    base: Schedule

    def __post_init__(self):
        if not self.base.variance_preserving:
            raise ValueError(
                f"base must be variance preserving (alpha^2 + sigma^2 = 1), as cosine and the beta tables are; "
                f"{type(self.base).__name__} is not"
            )
        _refuse_learned(self.base)

    @property
    def t_range(self) -> tuple[float, float]:
        return self.base.t_range

    def _last_alpha(self, device: torch.device) -> Tensor:
        return self.base.alpha(torch.full((), self.t_range[1], dtype=torch.float64, device=device))

    def alpha(self, t: Tensor) -> Tensor:
        last = self._last_alpha(t.device)
        alpha = (self.base.alpha(t.double()) - last) / (1 - last)
        # Compared in the dtype of t, which may not hold t_max; the difference would be 0 only up to rounding.
        return torch.where(t < self.t_range[1], alpha, 0).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        # sigma'^2 = (1 - alpha') (1 + alpha'), and 1 - alpha = sigma^2 / (1 + alpha) does not cancel near t = 0.
        alpha, sigma = self.base.alpha(t.double()), self.base.sigma(t.double())
        gap = sigma**2 / (1 + alpha) / (1 - self._last_alpha(t.device))
        return torch.where(t < self.t_range[1], (gap * (2 - gap)).sqrt(), 1).to(t.dtype)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        alpha, sigma_squared = log_snr.double().sigmoid().sqrt(), (-log_snr.double()).sigmoid()
        gap = sigma_squared / (1 + alpha) * (1 - self._last_alpha(log_snr.device))  # 1 - alpha of base
        return self.base.t_of_log_snr(2 * (-gap).log1p() - (gap * (2 - gap)).log()).to(log_snr.dtype)


def _refuse_learned(base: Schedule) -> None:
    # The inverse of a learned schedule does not know its parameters: gradients would be wrong, silently.
    if base.learned:
        raise ValueError("base must not be a learned schedule: move its log_snr_first and log_snr_last instead")
