"""Discrete processes in continuous time: num_timesteps betas, and a log alpha^2 that is linear between the steps."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusion_trainer.process.schedules import Cosine, Schedule


@dataclass(frozen=True)
class BetaTable(Schedule):
    """alpha(k/T)^2 = prod_{j<=k} (1 - beta_j), k = 1..T (Ho et al. 2020, eq. 4). Variance preserving.

    Between the steps log alpha^2 is linear in t, so the discrete process is met exactly at t = k/T and the inverse is
    exact everywhere.
    """

    variance_preserving: ClassVar[bool] = True
    num_timesteps: int = 1000

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, not {self.num_timesteps}")

    @abstractmethod
    def betas(self) -> Tensor:
        """(num_timesteps,) float64 in (0, 1), on the CPU."""

    @property
    def t_range(self) -> tuple[float, float]:
        return 1 / self.num_timesteps, 1.0

    def log_alpha_squared(self, t: Tensor) -> Tensor:
        table = _log_alpha_squared_table(self, t.device)
        return interpolate(table, t.double() * self.num_timesteps).to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return (self.log_alpha_squared(t) / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return self.log_alpha_squared(t).expm1().abs().sqrt()  # 1 - alpha^2, never a negative zero

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        table = _log_alpha_squared_table(self, log_snr.device)
        value = logsigmoid(log_snr.double())  # log alpha^2
        return (place_of(table, value) / self.num_timesteps).to(log_snr.dtype)


def interpolate(table: Tensor, place: Tensor) -> Tensor:
    """Piecewise linear: table (N,) at 0, 1, ..., N - 1; float64 places of any shape. Outside, the end pieces go on."""
    low = place.floor().long().clamp(0, len(table) - 2)
    return torch.lerp(table[low], table[low + 1], place - low)


def place_of(table: Tensor, value: Tensor) -> Tensor:
    """The inverse of `interpolate` for a strictly decreasing table."""
    high = torch.searchsorted(-table, -value).clamp(1, len(table) - 1)
    return high - 1 + (value - table[high - 1]) / (table[high] - table[high - 1])


@lru_cache(maxsize=64)  # once per schedule and device: no host-to-device copy in the training step
def _log_alpha_squared_table(schedule: BetaTable, device: torch.device) -> Tensor:
    """(T + 1,) float64: log prod_{j<=k} (1 - beta_j), k = 0..T."""
    with torch.device("cpu"):  # not a default device that whoever asks first has set, "meta" for one
        return torch.cat([torch.zeros(1, dtype=torch.float64), (-schedule.betas()).log1p().cumsum(0)]).to(device)


@dataclass(frozen=True)
class BetaRamp(BetaTable):
    """Betas that rise from beta_first to beta_last."""

    beta_first: float = 1e-4
    beta_last: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta_first <= self.beta_last < 1:
            raise ValueError(f"0 < beta_first <= beta_last < 1 must hold, not {self.beta_first} and {self.beta_last}")


@dataclass(frozen=True)
class LinearBeta(BetaRamp):
    """beta_k linear in k (Ho et al. 2020, section 4)."""

    def betas(self) -> Tensor:
        return torch.linspace(self.beta_first, self.beta_last, self.num_timesteps, dtype=torch.float64)


@dataclass(frozen=True)
class QuadraticBeta(BetaRamp):
    """sqrt(beta_k) linear in k (Ho et al. 2020, appendix B; with other ends Rombach et al. 2022)."""

    def betas(self) -> Tensor:
        return torch.linspace(self.beta_first**0.5, self.beta_last**0.5, self.num_timesteps, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class SigmoidBeta(BetaRamp):
    """beta_first + (beta_last - beta_first) sigmoid(x_k), x_k linear from -6 to 6 (code of Xu et al. 2022, GeoDiff).

    The first and the last beta are a quarter of a per cent of the range inside the ends.
    """

    def betas(self) -> Tensor:
        ramp = torch.linspace(-6, 6, self.num_timesteps, dtype=torch.float64).sigmoid()
        return self.beta_first + (self.beta_last - self.beta_first) * ramp


@dataclass(frozen=True)
class ConstantBeta(BetaTable):
    """All betas alike (Ho et al. 2020, appendix B)."""

    beta: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must lie in (0, 1), not {self.beta}")

    def betas(self) -> Tensor:
        return torch.full((self.num_timesteps,), self.beta, dtype=torch.float64)


@dataclass(frozen=True)
class CosineBeta(BetaTable):
    """The betas between neighbouring steps of `Cosine`, clipped at beta_max (Nichol and Dhariwal 2021, eq. 17)."""

    offset: float = 0.008
    beta_max: float = 0.999

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta_max < 1:
            raise ValueError(f"beta_max must lie in (0, 1), not {self.beta_max}")
        Cosine(self.offset)  # checks the offset

    def betas(self) -> Tensor:
        steps = torch.arange(self.num_timesteps + 1, dtype=torch.float64) / self.num_timesteps
        alpha_bar = Cosine(self.offset).alpha(steps) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=self.beta_max)
