"""The sub-sequence of times whose variational bound is lowest (Bao et al. 2022, section 4 and appendix E)."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from diffusion_trainer.process.analytic import Statistics, required
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import ReverseStep
from diffusion_trainer.sampling.grids import Grid


@dataclass(frozen=True)
class OptimalTrajectory(Grid):
    """num_steps of num_timesteps equally spaced times, by dynamic programming over the bound with the optimal variance
    and the decoder of what was trained on: bins of 8-bit pixels, a normal's density of real numbers (latents).

    statistics: a file that `diffusion-trainer variance` wrote; null is the checkpoint's own. ValueError without it.
    """

    statistics: str | None = None
    num_timesteps: int = 1000

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, not {self.num_timesteps}")

    def __call__(self, schedule: Schedule, num_steps: int) -> Tensor:
        if num_steps > self.num_timesteps:
            raise ValueError(f"num_steps={num_steps} is more than the {self.num_timesteps} times to choose from")
        return _trajectory(self, schedule, num_steps).clone()


@lru_cache(maxsize=16)
def _trajectory(grid: OptimalTrajectory, schedule: Schedule, num_steps: int) -> Tensor:
    """Kept, as samplers ask for their grid at every batch, and this is some 5 ms a step."""
    low, high = schedule.t_range
    times = torch.linspace(max(low, high / grid.num_timesteps), high, grid.num_timesteps, dtype=torch.float64)
    times = torch.cat([times.new_zeros(1), times])
    cost = step_costs(schedule, times, required(grid.statistics, "OptimalTrajectory"))
    return times[shortest_path(cost, num_steps)]


def step_costs(schedule: Schedule, times: Tensor, statistics: Statistics) -> Tensor:
    """(N, N) float64, entry [i, j] the part of the bound, in nats per dimension, of the step from times[j] to times[i];
    inf where that does not go down. times: (N,), ascending, the first 0.

    For s > 0 the expected KL of the optimal variance is log(variance / kept) / 2. To s = 0 it is what was measured: for
    8-bit pixels far below the cost of normal errors where many are at the ends of their range, for real numbers the
    entropy of a normal, which falls as long as the estimate improves.
    """
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    t, s = (
        Level(times[None, 1:], alpha[None, 1:], sigma[None, 1:]),
        Level(times[1:, None], alpha[1:, None], sigma[1:, None]),
    )
    log_snr = 2 * (alpha[1:].log() - sigma[1:].log())
    posterior = statistics.at(log_snr, diagonal=False)
    step = ReverseStep.of(t, s)
    later = times[None, 1:] > times[1:, None]
    inner = torch.where(later, (step.variance(posterior[None]) / step.kept).log() / 2, torch.inf)
    cost = torch.full((len(times), len(times)), torch.inf, dtype=torch.float64)
    cost[1:, 1:] = inner
    cost[0, 1:] = statistics.cost_of_decoding(log_snr)
    return cost


def shortest_path(cost: Tensor, num_steps: int) -> Tensor:
    """(num_steps + 1,) int64, descending: the indices of the cheapest path of that many steps from the last to 0."""
    best, came_from = cost[0].clone(), []  # of reaching each index from 0 in one step
    for _ in range(num_steps - 1):
        best, previous = (best[:, None] + cost).min(0)
        came_from.append(previous)
    path = [len(cost) - 1]
    for previous in reversed(came_from):
        path.append(int(previous[path[-1]]))
    return torch.tensor([*path, 0])
