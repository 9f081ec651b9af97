"""The one seam between training and sampling: (x_t, t, condition) -> x_0_hat."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffusion_trainer.conventions import expand
from diffusion_trainer.process.predictions import Prediction
from diffusion_trainer.process.schedules import Schedule


class Denoiser(ABC):
    """Estimates x_0_hat, (B, ...), the dtype of x_t. The condition is whatever its network takes; None is none."""

    @abstractmethod
    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """x_t: (B, ...); t: (B,)."""

    @abstractmethod
    def null(self, condition: Tensor | None) -> Tensor | None:
        """The condition that says nothing, in the shape of `condition`: what guidance steps away from."""


@dataclass(frozen=True)
class NetworkDenoiser(Denoiser):
    """A network's raw output F(x, c_noise, condition), read as its prediction says (Karras et al. 2022, eq. 7)."""

    network: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    null_condition: Callable[[Tensor | None], Tensor | None]
    schedule: Schedule
    prediction: Prediction

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        c = self.prediction.coefficients(self.schedule.alpha(t), self.schedule.sigma(t))
        output = self.network(expand(c.into, x_t) * x_t, c.noise, condition)
        return self.prediction.x_0_hat(output, x_t, c)

    def null(self, condition: Tensor | None) -> Tensor | None:
        return self.null_condition(condition)
