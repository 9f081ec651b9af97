"""Noise schedules: alpha(t) and sigma(t) of x_t = alpha(t) x_0 + sigma(t) eps, and their inverse."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin

import torch
from torch import Tensor


class Schedule(ABC):
    """A decreasing log-SNR. `t_range` is where it is finite: training draws t there, sampling ends by a jump to 0.

    All methods map elementwise, any shape, and keep the dtype.
    """

    @property
    @abstractmethod
    def t_range(self) -> tuple[float, float]: ...

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def t_of_log_snr(self, log_snr: Tensor) -> Tensor: ...

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self.alpha(t).log() - self.sigma(t).log())


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha(t) = cos(theta(t)) / cos(theta(0)), theta(t) = (t + offset) / (1 + offset) * pi / 2.

    Nichol and Dhariwal 2021, eq. 17, in continuous time. They clip beta at 0.999 where the SNR reaches zero; we end
    the range of t just before (`t_max`). Variance preserving.
    """

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
        alpha_squared, sigma_squared = log_snr.sigmoid(), (-log_snr).sigmoid()
        c, s = cos(self._theta_0), sin(self._theta_0)
        theta = torch.atan2((s**2 + c**2 * sigma_squared).sqrt(), c * alpha_squared.sqrt())
        return theta * (2 / pi) * (1 + self.offset) - self.offset


@dataclass(frozen=True)
class LinearBeta(Schedule):
    """beta_k linear in k = 1..num_timesteps, alpha(k/T)^2 = prod_{j<=k} (1 - beta_j) (Ho et al. 2020, section 4).

    Between the steps log alpha^2 is linear in t, so the discrete process is met exactly at t = k/T and the inverse is
    exact everywhere. Variance preserving.
    """

    num_timesteps: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 0.02

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, not {self.num_timesteps}")
        if not 0 < self.beta_first <= self.beta_last < 1:
            raise ValueError(f"0 < beta_first <= beta_last < 1 must hold, not {self.beta_first} and {self.beta_last}")

    @property
    def t_range(self) -> tuple[float, float]:
        return 1 / self.num_timesteps, 1.0

    def log_alpha_squared(self, t: Tensor) -> Tensor:
        table = _log_alpha_squared_table(self, t.device)
        k = t.double() * self.num_timesteps
        low = k.floor().long().clamp(0, self.num_timesteps - 1)
        return torch.lerp(table[low], table[low + 1], k - low).to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return (self.log_alpha_squared(t) / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return self.log_alpha_squared(t).expm1().abs().sqrt()  # 1 - alpha^2, never a negative zero

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        table = _log_alpha_squared_table(self, log_snr.device)
        value = -torch.nn.functional.softplus(-log_snr.double())  # log sigmoid(log_snr) = log alpha^2
        high = torch.searchsorted(-table, -value).clamp(1, self.num_timesteps)
        part = (value - table[high - 1]) / (table[high] - table[high - 1])
        return ((high - 1 + part) / self.num_timesteps).to(log_snr.dtype)


@lru_cache(maxsize=64)  # once per schedule and device: no host-to-device copy in the training step
def _log_alpha_squared_table(schedule: LinearBeta, device: torch.device) -> Tensor:
    """(T + 1,) float64: log prod_{j<=k} (1 - beta_j), k = 0..T."""
    betas = torch.linspace(schedule.beta_first, schedule.beta_last, schedule.num_timesteps, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)]).to(device)
