"""Guidance: from a denoiser to a denoiser, so that they nest and every solver has all of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.variances import Estimate


class Guidance(ABC):
    """`null`, and a network's second output for the condition itself, pass through to whatever wraps the result."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser itself where guidance would change nothing, so that this costs nothing."""


@dataclass(frozen=True)
class Guided(Denoiser):
    """Base of the denoisers that guidance returns."""

    inner: Denoiser

    def null(self, condition: Tensor | None) -> Tensor | None:
        return self.inner.null(condition)

    @property
    def precision(self) -> torch.dtype:
        return self.inner.precision

    def prepare(self, levels: Sequence[Level], device: torch.device) -> None:
        self.inner.prepare(levels, device)


def check_scale(scale: float) -> None:
    if not 0 <= scale < inf:  # also refuses nan
        raise ValueError(f"scale must not be negative nor infinite, not {scale}")


@dataclass(frozen=True)
class NoGuidance(Guidance):
    """The denoiser itself."""

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        return denoiser


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """x_0_hat(null) + scale (x_0_hat(condition) - x_0_hat(null)), Ho and Salimans 2022, eq. 6 with scale = 1 + w.

    Scale 1 is the identity and costs nothing; 0 is unconditional; above 1 trades diversity for fidelity. A large scale
    spreads the values of x_0_hat; `rescale` pulls each sample's standard deviation back towards that of
    x_0_hat(condition): 0 not at all, 1 all the way (phi of Lin et al. 2024, eq. 15 and 16).
    """

    scale: float = 1.0
    rescale: float = 0.0

    def __post_init__(self):
        check_scale(self.scale)
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must lie in [0, 1], not {self.rescale}")

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        return denoiser if self.scale == 1 else _ClassifierFreeDenoiser(denoiser, self.scale, self.rescale)


@dataclass(frozen=True)
class _ClassifierFreeDenoiser(Guided):
    scale: float
    rescale: float

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        null = None if condition is None else self.null(condition)
        if null is None:  # nothing to guide by: both estimates are the same
            return self.inner(x_t, level, condition)
        # One call of twice the batch, not two.
        x_0_hat, second = self.inner(torch.cat([x_t, x_t]), level, torch.cat([condition, null]))
        with_condition, without = x_0_hat.chunk(2)
        guided = torch.lerp(without, with_condition, self.scale)
        if self.rescale:
            guided = guided * (1 + self.rescale * (_ratio_of_deviations(with_condition, guided) - 1))
        return Estimate(guided, None if second is None else second[: len(x_t)])


def _ratio_of_deviations(wanted: Tensor, given: Tensor) -> Tensor:
    """std(wanted) / std(given) of each sample, (B, 1, ..., 1); 1 where `given` is constant, as no factor mends that."""
    dims = tuple(range(1, wanted.dim()))
    has = given.std(dims, correction=0, keepdim=True)
    ratio = wanted.std(dims, correction=0, keepdim=True) / has
    return torch.where(has > 0, ratio, 1.0)


class WeakModel(ABC):
    """A worse model of the same data: smaller, or trained for less long, or on less."""

    @abstractmethod
    def denoiser(self, device: torch.device) -> Denoiser:
        """On that device, for the same x_t and condition as the model that it guides. UserError if it cannot be had."""


@dataclass(frozen=True)
class AutoGuidance(Guidance):
    """x_0_hat + (scale - 1) (x_0_hat - x_0_hat of a weak model): Karras et al. 2024, "Guiding a diffusion model with a
    bad version of itself", whose w is the scale.

    The weak model is loaded before the first step, once for each device, and told the same condition. No null
    condition is needed: unconditional models can be guided too.
    """

    scale: float
    weak: WeakModel
    _loaded: dict[torch.device, Denoiser] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        check_scale(self.scale)

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        return denoiser if self.scale == 1 else _AutoGuidedDenoiser(denoiser, self)

    def weak_denoiser(self, device: torch.device) -> Denoiser:
        if device not in self._loaded:
            self._loaded[device] = self.weak.denoiser(device)
        return self._loaded[device]


@dataclass(frozen=True)
class _AutoGuidedDenoiser(Guided):
    guidance: AutoGuidance

    @property
    def precision(self) -> torch.dtype:
        """The coarser of the two, once the weak model is loaded."""
        weak = (denoiser.precision for denoiser in self.guidance._loaded.values())
        return max(self.inner.precision, *weak, key=lambda dtype: torch.finfo(dtype).eps)

    def prepare(self, levels: Sequence[Level], device: torch.device) -> None:
        self.inner.prepare(levels, device)
        self.guidance.weak_denoiser(device).prepare(levels, device)

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        estimate = self.inner(x_t, level, condition)
        weak = self.guidance.weak_denoiser(x_t.device)(x_t, level, condition).x_0_hat
        if weak.shape != estimate.x_0_hat.shape:
            raise UserError(
                f"guidance.weak: its estimates have the shape {tuple(weak.shape)}, those of the model to be guided "
                f"{tuple(estimate.x_0_hat.shape)}; it must be a model of the same data"
            )
        return Estimate(torch.lerp(weak, estimate.x_0_hat, self.guidance.scale), estimate.second)


@dataclass(frozen=True)
class Interval(Guidance):
    """Another guidance where low <= log-SNR <= high, and the denoiser alone elsewhere (Kynkaanniemi et al. 2024).

    They bound sigma / alpha = exp(-log_snr / 2). Outside of the interval the guidance's own network calls are saved.
    """

    inner: Guidance
    low: float
    high: float

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"the interval of log-SNR from low={self.low} to high={self.high} is empty")

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        guided = self.inner(denoiser)
        return denoiser if guided is denoiser else _IntervalDenoiser(denoiser, guided, self.low, self.high)


@dataclass(frozen=True)
class _IntervalDenoiser(Guided):
    guided: Denoiser
    low: float
    high: float

    @property
    def precision(self) -> torch.dtype:
        return self.guided.precision

    def prepare(self, levels: Sequence[Level], device: torch.device) -> None:
        self.guided.prepare(levels, device)  # whose innermost is `inner`

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        denoiser = self.guided if self.low <= level.log_snr <= self.high else self.inner
        return denoiser(x_t, level, condition)


@dataclass(frozen=True)
class Nested(Guidance):
    """Several in turn: the first is innermost, next to the network, and the last has the last word."""

    parts: list[Guidance]

    def __post_init__(self):
        for part in self.parts:
            if not isinstance(part, Guidance):
                raise ValueError(f"parts must be guidances, each with its _target_, not {part!r}")

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        for part in self.parts:
            denoiser = part(denoiser)
        return denoiser
