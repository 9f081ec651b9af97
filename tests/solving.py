"""What the tests of solvers share: noise that is counted, and the exact law of what a sampler draws."""

from dataclasses import replace
from functools import lru_cache

import torch
from exact import GAUSSIAN, ExactDenoiser

from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.variances import FixedSmall
from diffusion_trainer.sampling.adaptive import DormandPrince


class Noise:
    """Standard normal (n, 2) float64 from a seed; counts how often it is asked."""

    def __init__(self, n, seed=0):
        self.n, self.calls, self.generator = n, 0, torch.Generator().manual_seed(seed)

    def __call__(self):
        self.calls += 1
        return torch.randn(self.n, 2, generator=self.generator, dtype=torch.float64)


def unbounded(sampler, num_steps):
    return replace(sampler, num_steps=num_steps, x_0_bound=None)


def drawn(sampler, data, schedule, n, seed=0, on_step=None, variance=None):
    """x_0 (n, 2) and how often noise was asked for within the loop."""
    noise = Noise(n, seed)
    x_T = noise()
    x = sampler(ExactDenoiser(data), schedule, variance or FixedSmall(), x_T, None, noise, on_step)
    return x, noise.calls - 1


def law(sampler, schedule, variance=None, data=GAUSSIAN, denoiser=None):
    """Exact mean (2,) and covariance (2, 2) of what it draws for Gaussian data, from exact x_T. denoiser: the exact
    one, unless it is given.

    On a Gaussian every sampler (that is affine in x) is an affine map of its noises, so there is no Monte Carlo error.
    Row 0 has no noise at all; each of the others has one entry of one noise set to 1. A sampler that draws more than
    one noise a step needs more rows: 4 noises a step are provided for.
    """
    rows, calls = 1 + 2 * (4 * sampler.num_steps + 1), 0

    def noise():
        nonlocal calls
        z = torch.zeros(rows, 2, dtype=torch.float64)
        z[1 + 2 * calls : 3 + 2 * calls] = torch.eye(2)
        calls += 1
        return z

    (end,) = levels(schedule, [schedule.t_range[1]])
    alpha, sigma = torch.tensor(end.alpha, dtype=torch.float64), torch.tensor(end.sigma, dtype=torch.float64)
    root = torch.linalg.cholesky(data.covariance_t(alpha, sigma))
    x_T = (data.mean_t(alpha, sigma) + noise() @ root.T) / sigma
    x = sampler(denoiser or ExactDenoiser(data), schedule, variance or FixedSmall(), x_T, None, noise)
    return x[0], (x[1:] - x[0]).T @ (x[1:] - x[0])


def exact_flow(data, schedule, n, first, last):
    """From the first n noises at one level to x at the other. Of a mixture, by dopri5 at 1e-11."""
    if len(data.weights) > 1:
        return _adaptive(data, schedule, n, first, last)
    ends = (torch.tensor(v, dtype=torch.float64) for v in (first.alpha, first.sigma, last.alpha, last.sigma))
    return data.probability_flow(first.sigma * Noise(n)(), *ends)


@lru_cache
def _adaptive(data, schedule, n, first, last):
    solver, denoise = DormandPrince(1e-11, 1e-11), lambda x, level: ExactDenoiser(data)(x, level, None)
    (plan,) = solver.plan(schedule, torch.tensor([first.t, last.t], dtype=torch.float64), FixedSmall())
    return solver.step(denoise, first.sigma * Noise(n)(), plan, None, None)[0]


def errors_of(sampler, schedule, steps=(32, 64, 128, 256), data=GAUSSIAN, n=64):
    """Of a deterministic sampler at the last time of its grid, against the exact probability flow: one for each count.

    The sampler's final jump to 0 is not a solver's, and the last time of some grids depends on the number of steps, so
    the path before the jump is compared at its own end.
    """
    out = []
    for num_steps in steps:
        times, path = sampler.grid(schedule, num_steps), []
        drawn(unbounded(sampler, num_steps), data, schedule, n, on_step=lambda i, x, x_0_hat, p=path: p.append(x))
        truth = exact_flow(data, schedule, n, *levels(schedule, times[[0, -2]]))
        out.append((path[-2] - truth).norm().item())
    return out


def jumped(data, schedule):
    """The covariance of what ends with x_0_hat at the cleanest time, without Var[x_0 | x_t] there; of a Gaussian."""
    _, alpha, sigma = levels(schedule, schedule.t_range[:1])[0]
    return data.covariance() - data.posterior_covariance(data.means, alpha, sigma)[0]


def slope(steps, errors):
    """The exponent p of error ~ steps^-p, by least squares on the logarithms."""
    x, y = torch.tensor(steps, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return -(x @ y / (x @ x)).item()
