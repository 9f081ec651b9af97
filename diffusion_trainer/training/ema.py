"""Moving averages of the weights, kept as optimizer state: sharded, saved and offloaded like Adam's moments.

The hooks act on whatever fp32 tensors the optimizer steps. Under ZeRO these are this rank's flat partitions of the
master weights; so an average needs no communication and 4 bytes a parameter over all ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from diffusion_trainer.training.nonfinite import NonFinite

KEY = "ema"  # of the main average in the optimizer's state of each parameter; others have "ema.<name>"
CHUNK = 1 << 24  # elements: bounds the extra memory of an update


class Ema(ABC):
    """A choice of conf/ema."""

    @property
    @abstractmethod
    def tracks(self) -> Mapping[str, "EmaProfile"]:
        """The averages by their keys in the optimizer's state; the one that evaluation uses is KEY."""


class EmaProfile(Ema):
    """One average."""

    @property
    def tracks(self):
        return {KEY: self}

    @abstractmethod
    def decay(self, images_seen: int, batch_size: int) -> float:
        """Factor of the old average at the step that takes `images_seen` to `images_seen + batch_size`."""


@dataclass(frozen=True)
class Several(Ema):
    """Several averages at once; `main` names the one that evaluation and samples use."""

    profiles: Mapping[str, EmaProfile]
    main: str

    def __post_init__(self):
        if self.main not in self.profiles:
            raise ValueError(f"main={self.main} is none of the profiles {', '.join(self.profiles)}")
        wrong = [name for name in self.profiles if not name.isidentifier()]
        if wrong:
            raise ValueError(f"a profile's name is made of letters, digits and _, not {wrong[0]!r}")

    @property
    def tracks(self):
        return {KEY if name == self.main else key_of(name): profile for name, profile in self.profiles.items()}


def key_of(name: str) -> str:
    return f"{KEY}.{name}"


@dataclass(frozen=True)
class HalfLife(EmaProfile):
    """Weights of `half_life_images` ago count half. Early on the half-life is a fraction of the images seen.

    Karras et al. 2024 (EDM2's code for EDM): half-life = min(half_life_images, ramp_up_ratio * images seen).
    """

    half_life_images: int
    ramp_up_ratio: float = 0.05

    def __post_init__(self):
        if self.half_life_images <= 0 or self.ramp_up_ratio <= 0:
            raise ValueError("half_life_images and ramp_up_ratio must be positive")

    def decay(self, images_seen: int, batch_size: int) -> float:
        half_life = min(self.half_life_images, self.ramp_up_ratio * (images_seen + batch_size))
        return 0.5 ** (batch_size / half_life)


@dataclass(frozen=True)
class ConstantDecay(EmaProfile):
    """The same factor at every step, starting from the initial weights."""

    rate: float

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must lie in [0, 1), not {self.rate}")

    def decay(self, images_seen: int, batch_size: int) -> float:
        return self.rate


@dataclass(frozen=True)
class WarmUp(EmaProfile):
    """min(rate, (1 + n) / (10 + n)) at step n = 1, 2, ...: TensorFlow's ExponentialMovingAverage with num_updates."""

    rate: float

    __post_init__ = ConstantDecay.__post_init__

    def decay(self, images_seen: int, batch_size: int) -> float:
        step = images_seen / batch_size + 1
        return min(self.rate, (1 + step) / (10 + step))


@dataclass(frozen=True)
class PowerFunction(EmaProfile):
    """Weights of time t count t^gamma, so that the average's length is always the same share of the time that has
    passed (Karras et al. 2024, "Analyzing and improving ...", section 3.1). relative_std: the standard deviation of
    that density, over the time; less than 1/sqrt(12) = 0.2887, which the uniform average has.
    """

    relative_std: float

    def __post_init__(self):
        gamma_of(self.relative_std)

    @property
    def gamma(self) -> float:
        return gamma_of(self.relative_std)

    def decay(self, images_seen: int, batch_size: int) -> float:
        return (images_seen / (images_seen + batch_size)) ** (self.gamma + 1)


def gamma_of(relative_std: float) -> float:
    """The exponent whose density on [0, 1] has that standard deviation (Karras et al. 2024, algorithm 2).

    ValueError if no positive one has.
    """
    if not 0 < relative_std < 12**-0.5:
        raise ValueError(f"relative_std must lie in (0, {12**-0.5:.4f}), the uniform average's, not {relative_std}")
    square = relative_std**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def attach_ema(optimizer: Optimizer, decays: Mapping[str, Callable[[], float]], nonfinite: NonFinite) -> None:
    """Keeps state[p][key] of every parameter p of the optimizer for each key of `decays`, asked at each of its steps.

    Steps that `nonfinite` skips leave the averages as they are. ZeRO calls step() once for each parameter group with
    the others emptied, so nothing is counted per call.
    """
    initial: dict[Tensor, Tensor] = {}

    def before(optimizer: Optimizer, args, kwargs) -> None:
        for p in _parameters(optimizer):
            # Not yet into the state: Adam initializes its own only where the state is empty.
            if not decays.keys() <= optimizer.state.get(p, {}).keys():
                initial[p] = p.detach().clone()

    @torch.no_grad()
    def after(optimizer: Optimizer, args, kwargs) -> None:
        stepped = [p for p in _parameters(optimizer) if p.grad is not None]
        for key, decay in decays.items():
            for p in stepped:
                if key not in optimizer.state[p]:
                    optimizer.state[p][key] = initial[p].clone()
            if stepped:
                approach([optimizer.state[p][key] for p in stepped], stepped, nonfinite.kept * (1 - decay()))
        initial.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def approach(averages: list[Tensor], weights: list[Tensor], share: Tensor | float) -> None:
    """averages += share * (weights - averages); where `share` is a number on a device, nobody waits for it."""
    on_device = isinstance(share, Tensor) and share.device.type != "cpu"
    for ours, theirs in _chunks(averages, [w.detach() for w in weights]):
        if on_device:  # lerp would be a kernel for each tensor
            difference = torch._foreach_sub(theirs, ours)
            torch._foreach_mul_(difference, share)
            torch._foreach_add_(ours, difference)
        else:
            torch._foreach_lerp_(ours, theirs, [share] * len(ours) if isinstance(share, Tensor) else share)


def _chunks(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Pieces of up to some CHUNK elements of lists of tensors of the same shapes."""
    pieces, size = [], 0
    for tensors in zip(*lists, strict=True):
        flat = tensors[0].dim() == 1  # ZeRO's partitions, which hold many parameters
        for piece in zip(*(t.split(CHUNK) for t in tensors), strict=True) if flat else [tensors]:
            pieces, size = [*pieces, piece], size + piece[0].numel()
            if size >= CHUNK:
                yield tuple(map(list, zip(*pieces, strict=True)))
                pieces, size = [], 0
    if pieces:
        yield tuple(map(list, zip(*pieces, strict=True)))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
