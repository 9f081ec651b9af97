"""THE sampling loop."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.sampling.grids import Grid
from diffusion_trainer.sampling.solvers import Solver


@dataclass(frozen=True)
class Sampler:
    """A solver on a grid. `x_0_bound` clips each estimate of x_0 into [-bound, bound]; null leaves it as it is.

    (Clipping is Ho et al. 2020's; images live in [-1, 1], and where alpha is small a small error of eps is a large one
    of x_0.)
    """

    solver: Solver
    grid: Grid
    num_steps: int
    x_0_bound: float | None = 1.0

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {self.num_steps}")
        if self.x_0_bound is not None and self.x_0_bound <= 0:
            raise ValueError(f"x_0_bound must be positive or null, not {self.x_0_bound}")

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        x_T: Tensor,
        condition: Tensor | None,
        noise: Callable[[], Tensor],
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """x_T: (B, ...), a standard normal -> x_0: (B, ...). noise() -> the next standard normal like x_T.

        Starts from sigma(t_max) x_T: what is left of the data at t_max, alpha(t_max) E[x_0], is taken for nothing.

        on_step(i, x, x_0_hat) is called after each step with the tensors as they are.
        """
        seen: list[Tensor] = []

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            x_0_hat = denoiser(x, torch.full((len(x),), float(t), dtype=x.dtype, device=x.device), condition)
            seen[:] = [x_0_hat if self.x_0_bound is None else x_0_hat.clamp(-self.x_0_bound, self.x_0_bound)]
            return seen[0]

        times, state = self.grid(schedule, self.num_steps), self.solver.init()
        x = float(schedule.sigma(times[0])) * x_T
        for i in range(self.num_steps):
            x, state = self.solver.step(denoise, schedule, x, times[i], times[i + 1], state, noise)
            if on_step is not None:
                on_step(i, x, seen[0])
        return x
