"""How training draws t. Each returns (t, importance), both (B,): importance corrects the density to the uniform one.

Every density is drawn through its quantile function, from uniform numbers that are independent or stratified over the
global batch. Uncorrected, a density is part of the objective: it weighs the noise levels as its papers mean it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf, log, pi
from statistics import NormalDist

import torch
from torch import Tensor

from diffusion_trainer.conventions import Draws
from diffusion_trainer.process.schedules import Schedule

TINY = 1e-6  # shares of a density stay this far from 0 and 1: quantiles are finite, and no importance is without bound


class Timesteps(ABC):
    @abstractmethod
    def __call__(self, schedule: Schedule, draws: Draws) -> tuple[Tensor, Tensor]:
        """t in schedule.t_range."""

    @property
    def unbiased(self) -> bool:
        """Whether the mean of importance times loss is the loss's at uniform t."""
        return True

    @property
    def observes(self) -> bool:
        """Whether it adapts to the losses that `observe` shows it."""
        return False

    def observe(self, schedule: Schedule, loss: Tensor, t: Tensor) -> None:
        """loss, t: (total,) on the CPU, of the whole global batch; the loss is not yet corrected by importance."""
        return None

    def state(self) -> dict:
        """What it has learned, JSON."""
        return {}

    def load_state(self, state: dict) -> None:
        """The opposite of `state`."""
        return None


def stratified(draws: Draws) -> Tensor:
    """(B,) float64 in [0, 1): one in each of `total` equal parts, over the global batch, whatever the number of ranks.

    Each is uniform in its part, so batch means are unbiased and of lower variance than those of independent draws
    (Kingma et al. 2021, appendix I.1, with an offset of its own for each sample).
    """
    # In float32 the last part would round to 1, and large batches would leave u only a few bits.
    return (draws.place + draws.uniform("timesteps").double()) / draws.total


@dataclass(frozen=True)
class Uniform(Timesteps):
    """t uniform and independent for each sample (Ho et al. 2020, algorithm 1, in continuous time)."""

    def __call__(self, schedule: Schedule, draws: Draws) -> tuple[Tensor, Tensor]:
        return _uniform(draws.uniform("timesteps"), schedule)


@dataclass(frozen=True)
class Stratified(Timesteps):
    """t uniform, one in each of `total` equal parts of the range (see `stratified`)."""

    def __call__(self, schedule: Schedule, draws: Draws) -> tuple[Tensor, Tensor]:
        return _uniform(stratified(draws), schedule)


def _uniform(u: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    low, high = schedule.t_range
    t = (low + (high - low) * u).clamp(low, high).float()
    return t, torch.ones_like(t)


@dataclass(frozen=True)
class LogitNormal(Timesteps):
    """logit(t) ~ N(mean, std^2), restricted to the range, stratified (Esser et al. 2024, eq. 19).

    corrected: importance makes the loss that of uniform t; without it, as in the paper, the density is its weighting.
    The density vanishes faster than any power of t, so a narrow one is corrected badly: with std 1 the hundredth of the
    range nearest to 0, and to 1, is never drawn.
    """

    mean: float = 0.0
    std: float = 1.0
    corrected: bool = False

    def __post_init__(self):
        if not self.std > 0:
            raise ValueError(f"std must be positive, not {self.std}")

    def __call__(self, schedule: Schedule, draws: Draws) -> tuple[Tensor, Tensor]:
        low, high = schedule.t_range
        first, last = self._cdf(low), self._cdf(high)
        share = stratified(draws).clamp(TINY, 1 - TINY)
        n = torch.special.ndtri(first + (last - first) * share)
        t = torch.sigmoid(self.mean + self.std * n)
        importance = torch.ones_like(t)
        if self.corrected:  # d t / d share = std t (1 - t) (last - first) / N(n; 0, 1)
            importance = self.std * t * (1 - t) * (last - first) / (high - low) * (2 * pi) ** 0.5 * (n**2 / 2).exp()
        return t.clamp(low, high).float(), importance.float()

    @property
    def unbiased(self) -> bool:
        return self.corrected

    def _cdf(self, t: float) -> float:
        return NormalDist(self.mean, self.std).cdf(log(t / (1 - t)) if t < 1 else inf)


@dataclass(frozen=True)
class LogNormalSigma(Timesteps):
    """log(sigma / alpha) ~ N(mean, std^2), restricted to the range, stratified (Karras et al. 2022, table 1).

    The density is part of the objective, as in the paper: weighting=edm belongs to it. Not corrected to uniform t.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        if not self.std > 0:
            raise ValueError(f"std must be positive, not {self.std}")

    @property
    def unbiased(self) -> bool:
        return False

    @torch.no_grad()  # a learned schedule is not trained through its times
    def __call__(self, schedule: Schedule, draws: Draws) -> tuple[Tensor, Tensor]:
        share = stratified(draws).clamp(TINY, 1 - TINY)
        first, last = (self._cdf(schedule.log_snr(share.new_full((), end))) for end in schedule.t_range)
        log_sigma = self.mean + self.std * torch.special.ndtri(first + (last - first) * share)
        t = schedule.t_of_log_snr(-2 * log_sigma).clamp(*schedule.t_range)
        return t.float(), torch.ones_like(t).float()

    def _cdf(self, log_snr: Tensor) -> Tensor:
        return torch.special.ndtr((-log_snr / 2 - self.mean) / self.std)


class LossSecondMoment(Timesteps):
    """t in proportion to the root mean square of its loss, corrected, stratified (Nichol and Dhariwal 2021, eq. 18).

    The range is cut into equal bins, each of which remembers its last `history` losses (theirs: 10 for each discrete
    step); until all are full, t is uniform. A share of `uniform` goes to all bins alike.
    """

    def __init__(self, bins: int = 100, history: int = 10, uniform: float = 0.001):
        if bins < 2 or history < 1 or not 0 < uniform <= 1:
            raise ValueError(
                f"bins must be at least 2, history positive and uniform in (0, 1], not {bins}, {history} and {uniform}"
            )
        self.bins, self.history, self.uniform = bins, history, uniform
        self._losses: list[list[float]] = [[] for _ in range(bins)]

    def __call__(self, schedule: Schedule, draws: Draws) -> tuple[Tensor, Tensor]:
        u = stratified(draws)
        share = self.shares().to(u)
        edges = torch.cat([share.new_zeros(1), share.cumsum(0)])
        chosen = torch.searchsorted(edges, u, right=True).clamp(1, self.bins) - 1
        place = (chosen + ((u - edges[chosen]) / share[chosen]).clamp(0, 1)) / self.bins
        low, high = schedule.t_range
        return (low + (high - low) * place).clamp(low, high).float(), (1 / (share[chosen] * self.bins)).float()

    def shares(self) -> Tensor:
        """(bins,) float64, probabilities of the bins."""
        even = torch.full((self.bins,), 1 / self.bins, dtype=torch.float64)
        if any(len(losses) < self.history for losses in self._losses):
            return even
        size = torch.tensor(self._losses, dtype=torch.float64).square().mean(1).sqrt()
        return (1 - self.uniform) * size / size.sum() + self.uniform * even if size.sum() > 0 else even

    @property
    def observes(self) -> bool:
        return True

    def observe(self, schedule: Schedule, loss: Tensor, t: Tensor) -> None:
        low, high = schedule.t_range
        bins = ((t - low) / (high - low) * self.bins).long().clamp(0, self.bins - 1)
        for i, value in zip(bins.tolist(), loss.tolist(), strict=True):
            self._losses[i] = [*self._losses[i], value][-self.history :]

    def state(self) -> dict:
        return {"losses": self._losses}

    def load_state(self, state: dict) -> None:
        if state:
            self._losses = [list(losses) for losses in state["losses"]]
