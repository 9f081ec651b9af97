"""The seam of all solvers; each solver has its own file."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from diffusion_trainer.process.schedules import Schedule


class Solver(ABC):
    """One step of a sampler: no loop, no grid, no randomness of its own."""

    order: ClassVar[int]  # of the error in the step size, for the deterministic part

    def init(self) -> Any:
        """The state before the first step (multistep methods keep their history in it)."""
        return None

    @abstractmethod
    def step(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        schedule: Schedule,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        state: Any,
        noise: Callable[[], Tensor],
    ) -> tuple[Tensor, Any]:
        """x at time t -> x at time s < t, and the new state.

        denoise(x, t) -> x_0_hat; t, s: scalars, float64, on the CPU, so that coefficients are plain numbers and never
        wait for the device; noise() -> a standard normal like x, to be called at most once.
        """
