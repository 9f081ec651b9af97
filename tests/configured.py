"""Every sampler of conf/sampler and every schedule of conf/schedule, as the theorems of sampling take them."""

from dataclasses import dataclass, replace

import torch
from cases import each
from options import built

from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.edm import EDMHeun
from diffusion_trainer.sampling.euler_maruyama import EulerMaruyama
from diffusion_trainer.sampling.grids import Grid, Karras, UniformLogSNR, UniformTime
from diffusion_trainer.sampling.optimal_trajectory import OptimalTrajectory
from diffusion_trainer.sampling.pndm import IPNDM, PNDM
from diffusion_trainer.sampling.predictor_corrector import PredictorCorrector
from diffusion_trainer.sampling.sampler import Sampler

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
SAMPLERS = {
    # The optimal trajectory is DDIM(eta=1) on a grid that needs statistics of a trained network; it has its own tests.
    **{name: s for name, s in built("sampler").items() if not isinstance(s.grid, OptimalTrajectory)},
    "ddim_eta_half": Sampler(DDIM(eta=0.5), UniformTime(), 50),
    "edm_churn": Sampler(EDMHeun(churn=10.0, s_min=0.05, s_max=50.0), Karras(), 50),
}
# These know the score alone, not the linear part of the SDE: even their mean is only right to first order, and they
# refuse a schedule without signal at its end (see their docstrings and their own tests).
SCORE_STEPS = (EulerMaruyama, PredictorCorrector)

every_schedule = each("schedule", SCHEDULES)
every_sampler = each("sampler", SAMPLERS)


def served(sampler, schedule):
    return schedule.at_noisy_end.alpha > 0 or not isinstance(sampler.solver, SCORE_STEPS)


def fewest(sampler):
    """The least number of steps above one."""
    return sampler.solver.history + 1  # the last step is the sampler's


@dataclass(frozen=True)
class Stretch(Grid):
    """Equal steps of t well inside (0, 1), where sigma / alpha of no schedule is singular in t, and a jump to 0."""

    def __call__(self, schedule, num_steps):
        times = torch.linspace(0.5, 0.2, num_steps, dtype=torch.float64)
        return torch.cat([times, times.new_zeros(1)])


def for_measuring(sampler):
    """The sampler on a grid whose steps shrink everywhere as their number grows, between ends that stay.

    UniformLogSNR is one. Pseudo methods have their order in equal steps of t alone, and those of the whole range do not
    get small beside its singular ends (sigma goes as sqrt(t) at 0, and 1 / alpha as 1 / (1 - t) at 1).
    """
    return replace(sampler, grid=Stretch() if isinstance(sampler.solver, PNDM | IPNDM) else UniformLogSNR())


def by_solver(samplers):
    """One sampler for each solver: on the same grid the others would be the same test again."""
    first = {}
    for name, sampler in samplers.items():
        first.setdefault(sampler.solver, name)
    return {name: samplers[name] for name in first.values()}
