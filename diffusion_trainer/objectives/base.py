"""The seam of objectives."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from diffusion_trainer.conventions import Draws
from diffusion_trainer.process.predictions import Prediction
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import PosteriorVariance

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, c_noise, condition) -> F


class LossTerms(NamedTuple):
    """Of each sample, all (B,): the loss to average, the unweighted error of F, the time, its log-SNR, and the factor
    of the loss that corrects the density of t.
    """

    loss: Tensor
    error: Tensor
    t: Tensor
    log_snr: Tensor
    importance: Tensor


class Objective(ABC):
    """What is minimized: the terms of each sample's loss."""

    of_pixels: ClassVar[bool] = False  # whether the loss has the likelihood of 8-bit images
    schedule: Schedule
    prediction: Prediction

    @abstractmethod
    def __call__(self, network: Network, x_0: Tensor, condition: Tensor | None, draws: Draws) -> LossTerms:
        """x_0: (B, ...) in the network's space."""

    @property
    @abstractmethod
    def second(self) -> type[PosteriorVariance] | None:
        """The reverse variance that reads the network's second output; None if it needs to have none."""

    @property
    def learned(self) -> tuple[nn.Module, ...]:
        """Modules of its own whose parameters train with the network's."""
        return self.schedule.learned

    def trains(self, parameter: str) -> bool:
        """Whether the network's parameter of this name is trained; others stay as they were loaded."""
        return True

    def observe(self, loss: Tensor, t: Tensor) -> None:
        """After a step: the losses and times of the whole global batch, (total,) on the CPU, the same on all ranks."""
        return None

    @property
    def observes(self) -> bool:
        """Whether `observe` makes a difference: then ranks gather their losses after each step."""
        return False

    def state(self) -> dict:
        """What `observe` has learned, JSON, for checkpoints."""
        return {}

    def load_state(self, state: dict) -> None:
        """The opposite of `state`."""
        return None
