"""Noise schedules: alpha(t) and sigma(t) of x_t = alpha(t) x_0 + sigma(t) eps, and their inverse."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import cos, pi, sin
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import jvp

from diffusion_trainer.process.levels import Level, levels


class Schedule(ABC):
    """A decreasing log-SNR. `t_range` is where training draws t; sampling starts at its noisy end, and from its last
    time jumps to 0. alpha may be 0 at the noisy end, and only there; sigma(0) = 0.

    All methods map elementwise, any shape, and keep the dtype.
    """

    variance_preserving: ClassVar[bool] = False  # alpha^2 + sigma^2 = 1; a property where it depends on the fields

    @property
    @abstractmethod
    def t_range(self) -> tuple[float, float]: ...

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`; 0 at +inf."""

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def snr_rate(self, t: Tensor) -> Tensor:
        """-d SNR / dt: SNR times -d log_snr / dt, but finite where there is no signal."""

        def snr(t: Tensor) -> Tensor:
            return (self.alpha(t) / self.sigma(t)) ** 2

        return -jvp(snr, (t,), (torch.ones_like(t),))[1]

    def level(self, t: Tensor) -> Level:
        return Level(t, self.alpha(t), self.sigma(t))

    def level_at(self, t: float) -> Level:
        """Of floats."""
        return levels(self, [t])[0]

    @property
    def at_noisy_end(self) -> Level:
        return self.level_at(self.t_range[1])

    @property
    def learned(self) -> tuple[nn.Module, ...]:
        """The modules whose parameters train with the network's."""
        return ()

    def frozen(self) -> "Schedule":
        """The schedule as it is now, without parameters: what sampling uses."""
        return self


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha(t) = cos(theta(t)) / cos(theta(0)), theta(t) = (t + offset) / (1 + offset) * pi / 2.

    Nichol and Dhariwal 2021, eq. 17, in continuous time. They clip beta at 0.999 where the SNR reaches zero; we end
    the range of t just before (`t_max`). Variance preserving.
    """

    variance_preserving: ClassVar[bool] = True
    offset: float = 0.008
    t_min: float = 0.001
    t_max: float = 0.999

    def __post_init__(self):
        if not 0 < self.offset < 1:
            raise ValueError(f"offset must lie in (0, 1), not {self.offset}")
        if not 0 < self.t_min < self.t_max < 1:
            raise ValueError(f"0 < t_min < t_max < 1 must hold, not t_min={self.t_min}, t_max={self.t_max}")

    @property
    def t_range(self) -> tuple[float, float]:
        return self.t_min, self.t_max

    @property
    def _theta_0(self) -> float:
        return self.offset / (1 + self.offset) * pi / 2

    def _theta(self, t: Tensor) -> Tensor:
        return (t + self.offset) / (1 + self.offset) * (pi / 2)

    def alpha(self, t: Tensor) -> Tensor:
        return self._theta(t).cos() / cos(self._theta_0)

    def sigma(self, t: Tensor) -> Tensor:
        # 1 - alpha^2 cancels near t = 0; cos^2 a - cos^2 b = sin(b - a) sin(b + a) does not.
        theta, rise = self._theta(t), t / (1 + self.offset) * (pi / 2)
        return (rise.sin() * (theta + self._theta_0).sin()).sqrt() / cos(self._theta_0)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        alpha, sigma_squared = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid()
        c, s = cos(self._theta_0), sin(self._theta_0)
        # theta itself less theta_0 would cancel near t = 0: sine and cosine of the difference do not.
        sin_theta = (s**2 + c**2 * sigma_squared).sqrt()
        rise = torch.atan2(c * sigma_squared / (sin_theta + alpha * s), c**2 * alpha + sin_theta * s)
        return rise * (2 / pi) * (1 + self.offset)


@dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1, sigma = sigma_max t (Karras et al. 2022, table 1, whose time is sigma itself).

    sigma_min is the clean end of the range; Karras et al. space their steps by sigma^(1/7), not by t.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self):
        check_sigmas(self.sigma_min, self.sigma_max)

    @property
    def t_range(self) -> tuple[float, float]:
        return self.sigma_min / self.sigma_max, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).exp() / self.sigma_max


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t: straight lines (Liu et al. 2023, eq. 1; Lipman et al. 2023, section 4.1).

    Liu and Lipman count time the other way. With t_max = 1 the noisy end has no signal at all, and no log-SNR.
    """

    t_min: float = 0.001
    t_max: float = 0.999

    def __post_init__(self):
        if not 0 < self.t_min < self.t_max <= 1:
            raise ValueError(f"0 < t_min < t_max <= 1 must hold, not t_min={self.t_min}, t_max={self.t_max}")

    @property
    def t_range(self) -> tuple[float, float]:
        return self.t_min, self.t_max

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).sigmoid()


def check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"0 < sigma_min < sigma_max must hold, not {sigma_min} and {sigma_max}")


def check_t_min(t_min: float) -> None:
    if not 0 < t_min < 1:
        raise ValueError(f"t_min must lie in (0, 1), not {t_min}")
