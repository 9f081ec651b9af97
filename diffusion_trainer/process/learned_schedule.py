"""A log-SNR that trains with the network, and the table of it that sampling uses."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from math import expm1, log
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.functional import logsigmoid, softplus

from diffusion_trainer.process.beta_tables import interpolate, place_of
from diffusion_trainer.process.schedules import Schedule, check_t_min

NUM_INTERVALS = 2**14  # of the frozen table: log-SNR to 1e-4 as long as its second derivative is below 2e5


class FiniteLogSNR(Schedule):
    """Variance preserving, given by its log-SNR on [t_min, 1], which is finite at both ends.

    Below t_min, where nothing is trained, the SNR is that of t_min times t_min / t, so that t = 0 is data.
    """

    variance_preserving: ClassVar[bool] = True
    t_min: float

    @property
    def t_range(self) -> tuple[float, float]:
        return self.t_min, 1.0

    @abstractmethod
    def trained_log_snr(self, t: Tensor) -> Tensor:
        """t >= t_min, float64."""

    def continued_log_snr(self, t: Tensor) -> Tensor:
        exact = t.double()
        below = (self.t_min / exact.clamp(max=self.t_min)).log()
        return (self.trained_log_snr(exact.clamp(min=self.t_min)) + below).to(t.dtype)

    # exp(logsigmoid / 2) is sqrt(sigmoid), without the gradient 0 * inf where sigma is 0.
    def alpha(self, t: Tensor) -> Tensor:
        return (logsigmoid(self.log_snr(t.double())) / 2).exp().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (logsigmoid(-self.log_snr(t.double())) / 2).exp().to(t.dtype)


class LearnedSchedule(nn.Module, FiniteLogSNR):
    """A monotone network between two fixed log-SNRs (Kingma et al. 2021, appendix H).

    g(t) = l_1(t) + l_3(sigmoid(l_2(l_1(t)))) with positive weights, scaled to log_snr_first at t_min and to
    log_snr_last at 1; what the scaling and l_2 make redundant (the biases of l_1 and l_3) is left out. Starts almost
    linear in t, the same for every seed. Computed in float64, through `forward`: ZeRO-3 gathers parameters there.
    The inverse is that of `frozen()`, so no gradient of the parameters passes through it.
    """

    def __init__(
        self, log_snr_first: float = 13.3, log_snr_last: float = -5.0, features: int = 64, t_min: float = 0.001
    ):
        super().__init__()
        if not log_snr_first > log_snr_last:
            raise ValueError(f"log_snr_first must exceed log_snr_last, not {log_snr_first} and {log_snr_last}")
        if features < 1:
            raise ValueError(f"features must be at least 1, not {features}")
        check_t_min(t_min)
        self.log_snr_first, self.log_snr_last, self.t_min = log_snr_first, log_snr_last, t_min
        steepness = 10.0  # each feature rises over about a fifth of the range, around a place of its own
        self.weight_1 = nn.Parameter(torch.full((1,), _inverse_softplus(1.0)))
        self.weight_2 = nn.Parameter(torch.full((features,), _inverse_softplus(steepness)))
        self.bias_2 = nn.Parameter(-steepness * (torch.arange(features) + 0.5) / features)
        self.weight_3 = nn.Parameter(torch.full((features,), _inverse_softplus(1 / features)))

    def forward(self, t: Tensor, rate: bool = False) -> Tensor:
        """The log-SNR at t, any shape; or its derivative: within the module, for the hooks of ZeRO-3 have no jvp."""
        return jvp(self.continued_log_snr, (t,), (torch.ones_like(t),))[1] if rate else self.continued_log_snr(t)

    def snr_rate(self, t: Tensor) -> Tensor:
        return -self.log_snr(t).exp() * self(t, rate=True)

    def log_snr(self, t: Tensor) -> Tensor:
        return self(t)

    def trained_log_snr(self, t: Tensor) -> Tensor:
        first, last = (self._rising(torch.full_like(t, end)) for end in self.t_range)
        part = (self._rising(t) - first) / (last - first)
        return self.log_snr_first + (self.log_snr_last - self.log_snr_first) * part

    def _rising(self, t: Tensor) -> Tensor:
        weight_1, weight_2, weight_3 = (
            softplus(weight.double()) for weight in (self.weight_1, self.weight_2, self.weight_3)
        )
        line = t.unsqueeze(-1) * weight_1  # (..., 1)
        return (line + weight_3 * ((line * weight_2 + self.bias_2.double()).sigmoid())).sum(-1)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.frozen().t_of_log_snr(log_snr)

    @property
    def learned(self) -> tuple[nn.Module, ...]:
        return (self,)

    @torch.no_grad()
    def frozen(self) -> "LogSNRTable":
        """As it is now. Under ZeRO-3 every rank must call it, for it runs `forward`."""
        times = torch.linspace(self.t_min, 1, NUM_INTERVALS + 1, dtype=torch.float64, device=self.weight_1.device)
        return LogSNRTable(self(times).cpu(), self.t_min)


@dataclass(frozen=True, eq=False)
class LogSNRTable(FiniteLogSNR):
    """Piecewise linear: `table`, (N + 1,) float64 on the CPU, is the log-SNR at equally spaced t from t_min to 1."""

    table: Tensor
    t_min: float

    def __post_init__(self):
        if self.table.dtype != torch.float64 or self.table.dim() != 1 or len(self.table) < 2:
            raise ValueError(f"table must be (N + 1,) float64, not {tuple(self.table.shape)} {self.table.dtype}")
        if not (self.table.isfinite().all() and (self.table.diff() < 0).all()):
            raise ValueError("table must be finite and strictly decreasing; are the schedule's parameters finite?")

    @property
    def _intervals_per_t(self) -> float:
        return (len(self.table) - 1) / (1 - self.t_min)

    def log_snr(self, t: Tensor) -> Tensor:
        return self.continued_log_snr(t)

    def trained_log_snr(self, t: Tensor) -> Tensor:
        return interpolate(_table_on(self, t.device), (t - self.t_min) * self._intervals_per_t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        table, value = _table_on(self, log_snr.device), log_snr.double()
        above = (value - table[0]).clamp(min=0)  # towards the data, below t_min
        t = self.t_min + place_of(table, value.clamp(max=table[0])) / self._intervals_per_t
        return (t * (-above).exp()).to(log_snr.dtype)


@lru_cache(maxsize=8)
def _table_on(schedule: LogSNRTable, device: torch.device) -> Tensor:
    return schedule.table.to(device)


def _inverse_softplus(value: float) -> float:
    return log(expm1(value))
