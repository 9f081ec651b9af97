"""The reverse step x_t -> x_s, s < t: its mean and its variance, for samplers and for the variational bound.

All reverse variances live in one space, as all weights do: a variance is an estimate of Var[x_0 | x_t], and the step's
own is `kept` + of_x_0^2 Var[x_0 | x_t] (the law of total variance; Bao et al. 2022, theorem 1).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffusion_trainer.process.levels import Level

ROUNDING = 1e-12  # a coefficient so close to 1 differs from it by float64's rounding alone


def linear(of_x: float, x: Tensor | None, of_y: float, y: Tensor) -> Tensor:
    """of_x x + of_y y, in a new tensor. One operator instead of two where of_x is 1, as in Euler's steps of a flow."""
    if of_x == 0:
        return of_y * y
    if abs(of_x - 1) < ROUNDING:
        return torch.add(x, y, alpha=of_y)
    return (of_x * x).add_(y, alpha=of_y)


def clipped_visibly(x_0_hat: Tensor, bound: float) -> Tensor:
    """In [-bound, bound], or NaN for what is not finite."""
    return (x_0_hat + (x_0_hat - x_0_hat)).clamp_(-bound, bound)


class Estimate:
    """What a denoiser says of x_t: x_0_hat = E[x_0 | x_t], (B, ...), and its network's second output if it has one, of
    the same shape (what that means is for the variance to know that was trained with it). Unpacks into the two.

    A network's is skip x_t + out F, and is not computed until somebody reads it: a step that is a linear combination of
    x_t and x_0_hat is one of x_t and F, for half of the operators. None of the tensors may be written into.
    """

    __slots__ = ("_out", "_output", "_skip", "_x_0_hat", "_x_t", "second")

    def __init__(
        self,
        output: Tensor,
        second: Tensor | None = None,
        out: float = 1.0,
        skip: float = 0.0,
        x_t: Tensor | None = None,
    ):
        """x_0_hat = out output + skip x_t; with an output alone, that itself."""
        self._output, self.second, self._out, self._skip, self._x_t = output, second, out, skip, x_t
        self._x_0_hat = output if out == 1 and skip == 0 else None

    @property
    def x_0_hat(self) -> Tensor:
        # What the steps make of the estimate does not look at this: it is the same whether somebody watches or not.
        if self._x_0_hat is None:
            self._x_0_hat = self._computed()
        return self._x_0_hat

    def _computed(self) -> Tensor:
        return linear(self._skip, self._x_t, self._out, self._output)

    def clipped(self, bound: float) -> "Estimate":
        """With x_0_hat in [-bound, bound]."""
        if self._x_0_hat is None:  # nobody has it yet: no copy is needed
            return Estimate(self._computed().clamp_(-bound, bound), self.second)
        return Estimate(self._x_0_hat.clamp(-bound, bound), self.second)

    def clipped_visibly(self, bound: float) -> "Estimate":
        """As `clipped`, but what is infinite becomes NaN, for whoever looks for it: twice the time."""
        return Estimate(clipped_visibly(self.x_0_hat, bound), self.second)

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.x_0_hat, self.second))

    def combined(self, of_x_t: float, x_t: Tensor, of_x_0: float) -> Tensor:
        """of_x_t x_t + of_x_0 x_0_hat, in a new tensor."""
        if self._x_t is not None and self._x_t is not x_t:
            return self.added_to(of_x_t * x_t, of_x_0)
        return linear(of_x_t + of_x_0 * self._skip, x_t, of_x_0 * self._out, self._output)

    def added_to(self, total: Tensor, of_x_0: float) -> Tensor:
        """total + of_x_0 x_0_hat, written into total."""
        if self._skip:
            total.add_(self._x_t, alpha=of_x_0 * self._skip)
        return total.add_(self._output, alpha=of_x_0 * self._out)

    def eps_hat(self, x_t: Tensor, level: Level) -> Tensor:
        """(x_t - alpha x_0_hat) / sigma: the network's output itself where that is what it predicts."""
        of_output = -level.alpha * self._out / level.sigma
        if self._x_t is x_t and abs(1 - level.alpha * self._skip) < ROUNDING and abs(of_output - 1) < ROUNDING:
            return self._output
        return self.combined(1 / level.sigma, x_t, -level.alpha / level.sigma)


def transition_variance(t: Level, s: Level) -> float | Tensor:
    """Var[x_t | x_s] = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2; for neighbours of a discrete DDPM it is beta_t."""
    # sigma_t^2 (1 - SNR_t / SNR_s): the ratio is 0 at s = 0, which needs no case of its own.
    ratio = t.alpha * s.sigma / (s.alpha * t.sigma)
    return t.sigma**2 * (1 - ratio**2)


class ReverseStep(NamedTuple):
    """q(x_s | x_t, x_0) = N(of_x_t x_t + of_x_0 x_0, kept), of the family that shares DDPM's marginals.

    DDIM (Song et al. 2021, eq. 7 and 16): kept = eta^2 beta-tilde. eta 1 is DDPM (Ho et al. 2020, eq. 7), 0 keeps none.
    Floats or (B,), as the levels are.
    """

    of_x_t: float | Tensor
    of_x_0: float | Tensor
    kept: float | Tensor

    @classmethod
    def of(cls, t: Level, s: Level, eta: float = 1.0) -> "ReverseStep":
        if eta == 0:
            of_x_t = s.sigma / t.sigma
            return cls(of_x_t, s.alpha - of_x_t * t.alpha, 0 * of_x_t)
        ratio = t.alpha * s.sigma / (s.alpha * t.sigma)  # its square is SNR_t / SNR_s
        fresh = eta**2 * (1 - ratio**2)  # share of the variance at s that is drawn anew
        of_x_t = s.sigma * (1 - fresh) ** 0.5 / t.sigma
        return cls(of_x_t, s.alpha - of_x_t * t.alpha, s.sigma**2 * fresh)

    def variance(self, of_x_0: float | Tensor) -> float | Tensor:
        """Of the step, given Var[x_0 | x_t]: (B, ...) or whatever broadcasts to it."""
        return self.kept + self.of_x_0**2 * of_x_0


class PosteriorVariance(ABC):
    """An estimate of Var[x_0 | x_t], from which the variance of every reverse step follows."""

    trained_by: ClassVar[str | None] = None  # the objectives whose second output it reads

    @abstractmethod
    def at(self, t: Level, s: Level) -> Callable[[Estimate], float | Tensor]:
        """For the step from t to s: the estimate of Var[x_0 | x_t], a number or what broadcasts to (B, ...).

        What depends on the levels alone is computed here, once for a sampling run. ValueError without what it needs.
        """

    def like(self, x: Tensor) -> "PosteriorVariance":
        """The same for a run whose tensors are where x is and of its dtype: no step has to move or cast what it has."""
        return self


@dataclass(frozen=True)
class FixedSmall(PosteriorVariance):
    """0, so that DDPM's step has beta-tilde: optimal for data in one point (Ho et al. 2020, section 3.2)."""

    def at(self, t: Level, s: Level) -> Callable[[Estimate], float | Tensor]:
        return lambda estimate: 0.0 * t.sigma


@dataclass(frozen=True)
class FixedLarge(PosteriorVariance):
    """What gives DDPM's step the variance beta = Var[x_t | x_s]: optimal for x_0 ~ N(0, I) where the
    variance is preserved (Ho et al. 2020, section 3.2); there it is sigma_t^2.
    """

    def at(self, t: Level, s: Level) -> Callable[[Estimate], float | Tensor]:
        value = t.sigma**2 * (t.sigma**2 - s.sigma**2) / (s.alpha**2 * transition_variance(t, s))
        return lambda estimate: value


@dataclass(frozen=True)
class Learned(PosteriorVariance):
    """exp(f log beta + (1 - f) log beta-tilde), f = (second + 1) / 2 (Nichol and Dhariwal 2021, eq. 15).

    Trained by objective=hybrid. To s = 0, where beta-tilde is 0, half of beta stands for it (in their code the next
    step's does, which is that for betas that are nearly equal).
    """

    trained_by: ClassVar[str | None] = "objective=hybrid"

    def at(self, t: Level, s: Level) -> Callable[[Estimate], float | Tensor]:
        step, variance = ReverseStep.of(t, s), self.of_step(t, s)
        # In few steps of_x_0 is all there is; in many, v - kept is a small difference that must not turn negative.
        return lambda estimate: (variance(estimate) - step.kept).clamp(min=0) / step.of_x_0**2

    def of_step(self, t: Level, s: Level) -> Callable[[Estimate], Tensor]:
        """The variance of DDPM's step itself, (B, ...). Unlike what `at` makes of it, it has a gradient below
        beta-tilde.
        """
        beta, kept = transition_variance(t, s), ReverseStep.of(t, s).kept
        beta, small = (torch.as_tensor(value, dtype=torch.float64) for value in (beta, kept))
        small = torch.where(small > 0, small, beta / 2)
        ratio = torch.log(beta / small)
        return lambda estimate: small * torch.exp((estimate.second + 1) / 2 * ratio)


@dataclass(frozen=True)
class NoiseVariance(PosteriorVariance):
    """(sigma / alpha)^2 Var[eps | x_t], the network's second output being Var[eps | x_t] (Bao et al. 2022b).

    Trained by objective=npr or sn. At most `bound`: data in [-1, 1] has no larger variance.
    """

    bound: float | None = 1.0
    trained_by: ClassVar[str | None] = "objective=npr or sn"

    def at(self, t: Level, s: Level) -> Callable[[Estimate], float | Tensor]:
        if not t.alpha:  # x_t says nothing, and the residual of the noise is 0 / 0
            return lambda estimate: self.bound or 0.0
        factor = (t.sigma / t.alpha) ** 2
        return lambda estimate: (factor * estimate.second).clamp(min=0, max=self.bound)
