"""The one seam between training and sampling: (x_t, level, condition) -> x_0_hat."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.predictions import Coefficients, Prediction
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import ROUNDING, Estimate

MAX_KNOWN = 4096  # levels whose coefficients are kept


class Denoiser(ABC):
    """Estimates x_0_hat, (B, ...), the dtype of x_t. The condition is whatever its network takes; None is none."""

    @abstractmethod
    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        """x_t: (B, ...); level: floats, the same for all samples."""

    @abstractmethod
    def null(self, condition: Tensor | None) -> Tensor | None:
        """The condition that says nothing, in the shape of `condition`: what guidance steps away from."""

    @property
    def precision(self) -> torch.dtype:
        """Whose rounding the estimates have at least, whatever dtype they come in."""
        return torch.float64

    def prepare(self, levels: Sequence[Level], device: torch.device) -> None:  # noqa: B027 (most have nothing to do)
        """Before a run that will ask at these levels, maybe among others, for x_t on that device: what can be had in
        advance. Estimates are the same without it.
        """


@dataclass(frozen=True)
class NetworkDenoiser(Denoiser):
    """A network's raw output F(x, c_noise, condition), read as its prediction says (Karras et al. 2022, eq. 7).

    A network with twice the channels of x_t has a second output: see `Estimate`. Its output is kept for as long as the
    estimate is (a multistep solver has some of them): a network must not write over what it has returned.
    precision: in which it computes; autocast's is not to be seen in its output.
    """

    network: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    null_condition: Callable[[Tensor | None], Tensor | None]
    schedule: Schedule
    prediction: Prediction
    precision: torch.dtype = torch.float64
    _of_level: dict[Level, Coefficients] = field(default_factory=dict, init=False, repr=False, compare=False)
    _known: dict[Any, tuple[Coefficients, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        shape, dtype = x_t.shape, x_t.dtype  # each look at a tensor's costs a tenth of a microsecond
        key = (level, shape[0], dtype, x_t.device)
        (skip, out, into, _), c_noise = self._known.get(key) or self._learned(key, x_t)
        output = self.network(x_t if into == 1 else into * x_t, c_noise, condition)
        if output.dtype != dtype:
            output = output.to(dtype)
        # As split does, but for its call.
        first, second = (output, None) if output.shape == shape else split(output, x_t)
        return Estimate(first, second, out, skip, x_t)

    def _learned(self, key: Any, x_t: Tensor) -> tuple[Coefficients, Tensor]:
        """The coefficients as floats and the c_noise of a batch like x_t, once for each level it meets."""
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self.prepare((key[0],), x_t.device)
        c = self._of_level[key[0]]
        with torch.inference_mode(False):  # gradients may be wanted at this level later
            # Filled, not copied from the host; expanded, so that a network that writes into it fails instead of
            # changing it for the next run.
            self._known[key] = c, x_t.new_full((1,), c.noise).expand(x_t.shape[0])
        return self._known[key]

    def prepare(self, levels: Sequence[Level], device: torch.device) -> None:
        new = [level for level in levels if level not in self._of_level]
        if not new:
            return
        if len(self._of_level) >= MAX_KNOWN:  # an adaptive solver never comes back to its levels
            self._of_level.clear()
            new = levels
        tensors = Level(*torch.tensor(new, dtype=torch.float64).T)
        numbers = (c.tolist() for c in self.prediction.coefficients(self.schedule, tensors))
        for level, c in zip(new, map(Coefficients._make, zip(*numbers, strict=True)), strict=True):
            self._of_level[level] = c._replace(into=1.0 if abs(c.into - 1) < ROUNDING else c.into)

    def null(self, condition: Tensor | None) -> Tensor | None:
        return self.null_condition(condition)


def split(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """The network's output and its second one, (B, C, ...) each; None if it has only C channels.

    ValueError for any other shape: a dimension of 1 would be broadcast in silence.
    """
    shape, channels = x_t.shape, x_t.shape[1]
    if output.shape == shape:
        return output, None
    if output.shape != (shape[0], 2 * channels, *shape[2:]):
        raise ValueError(
            f"the network gave {tuple(output.shape)} for x_t {tuple(shape)}; it must be that shape, or one with "
            f"{2 * channels} channels"
        )
    return output[:, :channels], output[:, channels:]
