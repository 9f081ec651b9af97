"""The seam of all solvers; each family has its own file."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import Estimate, PosteriorVariance

Denoise = Callable[[Tensor, Level], Estimate]
Noise = Callable[[], Tensor]


class Combination(NamedTuple):
    """of_x x + sum_i weights[i] x_0_hat[i]; more estimates than weights may be at hand. That of x goes first."""

    of_x: float
    weights: tuple[float, ...]

    def __call__(self, x: Tensor, estimates: Sequence[Estimate]) -> Tensor:
        out = estimates[0].combined(self.of_x, x, self.weights[0])
        for i in range(1, len(self.weights)):  # a third of the time of a loop over slices
            estimates[i].added_to(out, self.weights[i])
        return out


class Solver(ABC):
    """One step of a sampler: no loop, no grid, no randomness of its own, no device to wait for.

    Solvers never step to t = 0: that last step is the sampler's, and it is the same for all.
    """

    order: ClassVar[int]  # of the error in the step size; of the law's for stochastic solvers
    history: ClassVar[int] = 1  # how many estimates a step combines that earlier steps have made, and its own
    keeps_x: ClassVar[bool] = False  # whether a step starts from an x of its state, whatever has moved x since
    uses_variance: ClassVar[bool] = False  # whether the reverse variance makes a difference

    @property
    def deterministic(self) -> bool:
        """A map from x_T to x_0 without noise on the way; it can then be run backwards as well."""
        return True

    def check(self, precision: torch.dtype) -> None:  # noqa: B027 (all but one can)
        """UserError if the method cannot work with estimates that are rounded to that."""

    def init(self) -> Any:
        """The state before the first step (multistep methods keep their history in it)."""
        return None

    @abstractmethod
    def plan(self, schedule: Schedule, times: Tensor, variance: PosteriorVariance) -> Sequence[Any]:
        """What each of the steps between the N times must know, as plain numbers: computed once for a sampling run.

        times: (N,) float64, decreasing, all positive (increasing for a deterministic solver that encodes); N - 1 steps.
        ValueError if the schedule cannot be served.
        """

    @abstractmethod
    def step(self, denoise: Denoise, x: Tensor, plan: Any, state: Any, noise: Noise) -> tuple[Tensor, Any]:
        """x at the start of the planned step -> x at its end, and the new state.

        denoise(x, level) -> Estimate; noise() -> a standard normal like x.
        """


def levels_in(plan: Sequence[Any]) -> Iterator[Level]:
    """All levels in what `Solver.plan` returns, which hold those at which its steps ask for estimates."""
    for part in plan:
        if type(part) is Level:
            yield part
        elif isinstance(part, tuple):
            yield from levels_in(part)
