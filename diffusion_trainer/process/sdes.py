"""The SDEs of Song, Sohl-Dickstein et al. 2021 (score-based models through SDEs), the only Song et al. in this file."""

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusion_trainer.process.schedules import Schedule, check_sigmas, check_t_min


@dataclass(frozen=True)
class LinearRate(Schedule):
    """The SDE's rate beta(t) = beta_min + t (beta_max - beta_min) (Song et al. 2021, eq. 32), and its integral B(t).

    alpha = exp(-B / 2). Song et al. train down to t = 1e-5 and sample down to 1e-3; we do both down to `t_min`.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 0.001

    def __post_init__(self):
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"0 < beta_min <= beta_max must hold, not {self.beta_min} and {self.beta_max}")
        check_t_min(self.t_min)

    @property
    def t_range(self) -> tuple[float, float]:
        return self.t_min, 1.0

    def integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + t * ((self.beta_max - self.beta_min) / 2))

    def t_of_integral(self, integral: Tensor) -> Tensor:
        # The root of the quadratic in the form that subtracts nothing.
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral).sqrt()
        return 2 * integral / (self.beta_min + root)

    def alpha(self, t: Tensor) -> Tensor:
        return (-self.integral(t) / 2).exp()


@dataclass(frozen=True)
class VPSDE(LinearRate):
    """sigma^2 = 1 - exp(-B(t)) (Song et al. 2021, eq. 33). Variance preserving."""

    variance_preserving: ClassVar[bool] = True

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.integral(t)).expm1().abs().sqrt()  # abs: never a negative zero

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.t_of_integral(-logsigmoid(log_snr))  # log sigmoid(log_snr) = log alpha^2 = -B


@dataclass(frozen=True)
class SubVP(LinearRate):
    """sigma = 1 - exp(-B(t)): the variance is below that of `VPSDE` (Song et al. 2021, eq. 35)."""

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.integral(t)).expm1().abs()

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        # sigma / alpha = 1 / alpha - alpha = 2 sinh(B / 2)
        return self.t_of_integral(2 * ((-log_snr / 2).exp() / 2).asinh())


@dataclass(frozen=True)
class VE(Schedule):
    """alpha = 1, sigma^2 = s(t)^2 - s(0)^2, s(t) = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, eq. 29-30).

    Variance exploding. Song et al. then leave s(0)^2 away (eq. 31), so that their x_0 carries noise of sigma_min.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 0.001

    def __post_init__(self):
        check_sigmas(self.sigma_min, self.sigma_max)
        check_t_min(self.t_min)

    @property
    def t_range(self) -> tuple[float, float]:
        return self.t_min, 1.0

    @property
    def _rate(self) -> float:
        return 2 * log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self._rate * t).expm1().sqrt()

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((-log_snr).exp() / self.sigma_min**2).log1p() / self._rate
