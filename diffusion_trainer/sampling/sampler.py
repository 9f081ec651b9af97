"""THE sampling loop, in both directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import Estimate, FixedSmall, PosteriorVariance
from diffusion_trainer.sampling.grids import Grid
from diffusion_trainer.sampling.solvers import Denoise, Noise, Solver, levels_in

OnStep = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Sampler:
    """A solver on a grid. `x_0_bound` clips each estimate of x_0 into [-bound, bound]; null leaves it as it is.

    (Clipping is Ho et al. 2020's; images live in [-1, 1], and where alpha is small a small error of eps is a large one
    of x_0.) The last of the num_steps steps, from the cleanest time of the grid to 0, is x_0_hat whatever the solver.
    """

    solver: Solver
    grid: Grid
    num_steps: int
    x_0_bound: float | None = 1.0

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {self.num_steps}")
        history = self.solver.history
        if 1 < self.num_steps <= history:
            raise ValueError(
                f"num_steps={self.num_steps} is too few for {_name(self.solver)}, whose steps combine "
                f"{history} estimates: use at least {history + 1}, as the last step is x_0_hat itself (or 1, only that)"
            )
        if self.x_0_bound is not None and not self.x_0_bound > 0:  # also refuses nan
            raise ValueError(f"x_0_bound must be positive or null, not {self.x_0_bound}")

    def plan(
        self, schedule: Schedule, variance: PosteriorVariance, x: Tensor | None = None
    ) -> tuple[list[Level], Sequence[Any]]:
        """The levels that steps start from, cleanest last, and the solver's plan of the steps between them, for a run
        whose tensors are like x.

        ValueError if solver, grid, schedule and variance do not go together.
        """
        if not self.solver.uses_variance and variance != FixedSmall():
            raise ValueError(
                f"{_name(self.solver)} has no use for the reverse variance {_name(variance)}; choose "
                "variance=beta_tilde, or sampler=ddim or ancestral"
            )
        times = self.grid(schedule, self.num_steps)[:-1]
        variance = variance if x is None else variance.like(x)
        return levels(schedule, times), self.solver.plan(schedule, times, variance)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        variance: PosteriorVariance,
        x_T: Tensor,
        condition: Tensor | None,
        noise: Noise,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """x_T: (B, ...), a standard normal -> x_0: (B, ...). noise() -> the next standard normal like x_T.

        Starts from sigma(t_max) x_T: what is left of the data at t_max, alpha(t_max) E[x_0], is taken for nothing.

        on_step(i, x, x_0_hat) is called after each step with the tensors as they are. UserError if the network's
        estimates are too coarse for the solver, or not finite: NaN anywhere, infinite ones, which may be clipped on the
        way, in the last step.
        """
        at, plan = self.plan(schedule, variance, x_T)
        seen: list[Estimate | None] = [None]
        denoise = self._denoise(denoiser, condition, seen, [*levels_in(plan), at[-1]], x_T.device)
        x, state = at[0].sigma * x_T, self.solver.init()
        for i, step in enumerate(plan):
            x, state = self.solver.step(denoise, x, step, state, noise)
            if on_step is not None:
                on_step(i, x, seen[0].x_0_hat)
        x_0 = denoise(x, at[-1], last=True).x_0_hat
        if on_step is not None:
            on_step(self.num_steps - 1, x_0, x_0)
        return _finite(x_0, f"{_name(self.solver)} on {_name(schedule)}")

    @torch.no_grad()
    def encode(self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, condition: Tensor | None) -> Tensor:
        """x_0 -> the x_T, both (B, ...), that the deterministic map takes to it: the same steps backwards (Song, Meng
        and Ermon 2021, section 4.3). alpha x_0 is taken for x at the cleanest time. ValueError for a solver that draws
        noise.
        """
        at, x = self._flow(denoiser, schedule, x_0, condition, encode=True)
        return x / at.sigma

    @torch.no_grad()
    def decode(self, denoiser: Denoiser, schedule: Schedule, x_T: Tensor, condition: Tensor | None) -> Tensor:
        """x_T -> x_0, the inverse of `encode`: it ends with x / alpha at the cleanest time, not with a jump to 0."""
        at, x = self._flow(denoiser, schedule, x_T, condition, encode=False)
        return x / at.alpha

    def _flow(self, denoiser, schedule, start, condition, encode: bool) -> tuple[Level, Tensor]:
        """The last level and x there, along the grid without its jump; encode: from its clean end to the noisy one."""
        if not self.solver.deterministic:
            raise ValueError(f"{_name(self.solver)} draws noise on its way, so that it has no inverse")
        times = self.grid(schedule, self.num_steps)[:-1]
        times = times.flip(0) if encode else times
        at, plan = levels(schedule, times), self.solver.plan(schedule, times, FixedSmall())
        denoise = self._denoise(denoiser, condition, [None], [*levels_in(plan)], start.device)
        x, state = (at[0].alpha if encode else at[0].sigma) * start, self.solver.init()
        for step in plan:
            x, state = self.solver.step(denoise, x, step, state, _no_noise)
        return at[-1], _finite(x, f"{_name(self.solver)} on {_name(schedule)}")

    def _denoise(self, denoiser, condition, seen: list[Estimate | None], asked: Sequence[Level], device) -> Denoise:
        """What the steps ask, at the levels `asked` as far as they are planned; UserError for a denoiser too coarse."""
        denoiser.prepare(asked, device)
        self.solver.check(denoiser.precision)  # known only then where another model guides
        bound = self.x_0_bound

        def denoise(x: Tensor, level: Level, last: bool = False) -> Estimate:
            estimate = denoiser(x, level, condition)
            if bound is not None:
                estimate = estimate.clipped_visibly(bound) if last else estimate.clipped(bound)
            seen[0] = estimate
            return estimate

        return denoise


def _no_noise() -> Tensor:
    raise AssertionError("a deterministic solver asked for noise")


def _finite(x: Tensor, what: str) -> Tensor:
    """The one look at the numbers, after the last step: no step waits for the device."""
    if isfinite(x.sum().item()):  # a tenth of the time of the exact look, which decides where a sum overflows
        return x
    good = x.isfinite().flatten(1).all(1)
    if not good.all():
        raise UserError(
            f"{int((~good).sum())} of {len(x)} samples are not finite ({what}): the network returns inf or NaN. Look "
            "at the loss of its training; precision=fp32 tells an overflow from weights that are broken"
        )
    return x


def _name(thing: object) -> str:
    return type(thing).__name__
