"""The one seam between training and sampling: (x_t, level, condition) -> x_0_hat."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.predictions import Coefficients, Prediction
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import Estimate

MAX_KNOWN = 4096  # levels whose coefficients are kept


class Denoiser(ABC):
    """Estimates x_0_hat, (B, ...), the dtype of x_t. The condition is whatever its network takes; None is none."""

    @abstractmethod
    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        """x_t: (B, ...); level: floats, the same for all samples."""

    @abstractmethod
    def null(self, condition: Tensor | None) -> Tensor | None:
        """The condition that says nothing, in the shape of `condition`: what guidance steps away from."""


@dataclass(frozen=True)
class NetworkDenoiser(Denoiser):
    """A network's raw output F(x, c_noise, condition), read as its prediction says (Karras et al. 2022, eq. 7).

    A network with twice the channels of x_t has a second output: see `Estimate`.
    """

    network: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    null_condition: Callable[[Tensor | None], Tensor | None]
    schedule: Schedule
    prediction: Prediction
    _known: dict[Level, Coefficients] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        c = self._coefficients(level)
        into = x_t if c.into == 1 else c.into * x_t
        output = self.network(into, x_t.new_full((len(x_t),), c.noise), condition).to(x_t.dtype)
        first, second = split(output, x_t)
        x_0_hat = c.out * first if c.skip == 0 else (c.skip * x_t).add_(first, alpha=c.out)
        return Estimate(x_0_hat, second)

    def _coefficients(self, level: Level) -> Coefficients:
        """As floats, once for each level that the denoiser meets."""
        if level not in self._known:
            if len(self._known) == MAX_KNOWN:  # an adaptive solver never comes back to its levels
                self._known.clear()
            tensors = Level(*(torch.tensor([value], dtype=torch.float64) for value in level))
            self._known[level] = Coefficients(*(c.item() for c in self.prediction.coefficients(self.schedule, tensors)))
        return self._known[level]

    def null(self, condition: Tensor | None) -> Tensor | None:
        return self.null_condition(condition)


def split(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """The network's output and its second one, (B, C, ...) each; None if it has only C channels.

    ValueError for other numbers of channels: a single one would be broadcast in silence.
    """
    channels, given = x_t.shape[1], output.shape[1]
    if given not in (channels, 2 * channels):
        raise ValueError(f"the network gave {given} channels; x_t has {channels}, so give {channels} or {2 * channels}")
    return (output, None) if given == channels else (output[:, :channels], output[:, channels:])
