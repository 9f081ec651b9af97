"""Solvers of the reverse SDE against the papers' formulas, and in the limit against the truth.

The corrector's step size is a sample's own: with D dimensions that alone is worth a relative error of 4 / D, so it is
tested on images of 512 pixels in two channels, each pixel a draw of the mixture on its own.
"""

from dataclasses import replace

import pytest
import torch
from cases import each
from configured import SAMPLERS, by_solver
from exact import GAUSSIAN, MIXTURE, ExactDenoiser, Pixels, Says
from options import built
from oracle import Mixture
from solving import Noise, law, unbounded
from torch.testing import assert_close

from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.variances import FixedLarge, FixedSmall
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.euler_maruyama import EulerMaruyama
from diffusion_trainer.sampling.grids import UniformLogSNR, UniformTime
from diffusion_trainer.sampling.predictor_corrector import PredictorCorrector, ReverseDiffusion
from diffusion_trainer.sampling.sampler import Sampler
from diffusion_trainer.sampling.solvers import Solver

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
EXACT = ExactDenoiser(MIXTURE)
each_sde = each("schedule", {name: SCHEDULES[name] for name in ("ve", "edm", "vp_sde", "linear")})
each_solver = each("solver", {"euler_maruyama": EulerMaruyama(), "reverse_diffusion": ReverseDiffusion()})
TIMES = torch.tensor([0.7, 0.6, 0.59], dtype=torch.float64)


class PixelNoise(Noise):
    """(n, 512, 2) float64."""

    def __call__(self):
        self.calls += 1
        return torch.randn(self.n, 512, 2, generator=self.generator, dtype=torch.float64)


class Still(Solver):
    """Stays where it is; its state counts its steps."""

    order = 7
    history = 3
    uses_variance = True

    def init(self):
        return 0

    def plan(self, schedule, times, variance):
        return [variance] * (len(times) - 1)

    def step(self, denoise, x, plan, state, noise):
        assert plan == FixedLarge()
        return x, state + 1


def steps(solver, schedule, times, x, noise, exact=EXACT, variance=None):
    state = solver.init()
    for plan in solver.plan(schedule, times, variance or FixedSmall()):
        x, state = solver.step(lambda x, level: exact(x, level, None), x, plan, state, noise)
    return x


def score(x, level):
    return MIXTURE.score(x.reshape(-1, 2), *torch.tensor(level[1:], dtype=torch.float64)).reshape(x.shape)


def rates(schedule, t):
    """f and g^2 as the papers have them, of three schedules (Song et al. 2021b, eq. 29, 32 and 34)."""
    if schedule is SCHEDULES["vp_sde"]:
        beta = schedule.beta_min + t * (schedule.beta_max - schedule.beta_min)
        return -beta / 2, beta
    if schedule is SCHEDULES["sub_vp"]:
        beta = schedule.beta_min + t * (schedule.beta_max - schedule.beta_min)
        integral = schedule.beta_min * t + (schedule.beta_max - schedule.beta_min) * t**2 / 2
        return -beta / 2, beta * (1 - torch.tensor(-2 * integral, dtype=torch.float64).exp().item())
    ratio = schedule.sigma_max / schedule.sigma_min
    growth = schedule.sigma_min**2 * ratio ** (2 * t)
    return 0.0, growth * 2 * torch.tensor(ratio, dtype=torch.float64).log().item()


@each("schedule", {name: SCHEDULES[name] for name in ("vp_sde", "sub_vp", "ve")})
def test_euler_maruyama_steps_back_along_the_papers_sde(schedule):
    for t, s in ((0.7, 0.6), (1.0, 0.99), (0.02, 0.01)):
        (level,), (f, g_squared), h = levels(schedule, [t]), rates(schedule, t), t - s
        x = level.sigma * Noise(5)()
        expected = x - h * (f * x - g_squared * score(x, level)) + (g_squared * h) ** 0.5 * Noise(5, 1)()
        times = torch.tensor([t, s], dtype=torch.float64)
        assert_close(steps(EulerMaruyama(), schedule, times, x, Noise(5, 1)), expected, rtol=1e-8, atol=1e-8)


def test_reverse_diffusion_is_algorithm_2_on_ve():
    schedule = SCHEDULES["ve"]
    t, s = levels(schedule, TIMES[:2])
    x, growth = t.sigma * Noise(5)(), t.sigma**2 - s.sigma**2
    expected = x + growth * score(x, t) + growth**0.5 * Noise(5, 1)()
    assert_close(steps(ReverseDiffusion(), schedule, TIMES[:2], x, Noise(5, 1)), expected, rtol=1e-9, atol=1e-9)


def test_reverse_diffusion_is_algorithm_3_on_the_betas_of_ddpm():
    schedule = SCHEDULES["linear"]
    for k in (2, 500, 1000):
        times = torch.tensor([k, k - 1], dtype=torch.float64) / 1000
        (t, _), beta = levels(schedule, times), schedule.betas()[k - 1]
        x = Noise(5)()
        expected = (2 - (1 - beta).sqrt()) * x + beta * score(x, t) + beta.sqrt() * Noise(5, 1)()
        assert_close(steps(ReverseDiffusion(), schedule, times, x, Noise(5, 1)), expected, rtol=1e-8, atol=1e-8)


@each_sde
@each_solver
def test_law_of_gaussian_data_is_met_to_first_order_or_better(solver, schedule):
    grid = UniformLogSNR() if schedule is SCHEDULES["edm"] else UniformTime()
    coarse, fine = (law(Sampler(solver, grid, n, None), schedule) for n in (75, 150))
    errors = [(covariance - GAUSSIAN.covariance()).norm() for _, covariance in (coarse, fine)]
    assert errors[1] < 0.06
    assert errors[1] < 0.62 * errors[0]
    assert (fine[0] - GAUSSIAN.mean()).abs().max() < 0.05
    assert (fine[0] - GAUSSIAN.mean()).norm() < 0.6 * (coarse[0] - GAUSSIAN.mean()).norm() + 1e-9


def close_to(x, data, mean=0.0, covariance=0.0):
    """Pixels within five standard errors and an error of the method."""
    x = x.reshape(-1, 2)
    variance, n = data.covariance().diagonal().max(), len(x)
    assert (x.mean(0) - data.mean()).abs().max() < 5 * (variance / n) ** 0.5 + mean
    assert (torch.cov(x.T) - data.covariance()).abs().max() < 5 * variance * (2 / n) ** 0.5 + covariance


@pytest.mark.slow
@each("schedule", {name: schedule for name, schedule in SCHEDULES.items() if schedule.at_noisy_end.alpha > 0})
@each("sampler", {name: SAMPLERS[name] for name in ("euler_maruyama", "predictor_corrector_vp")})
def test_mean_and_covariance_of_a_mixture_are_met_on_every_schedule_that_is_served(sampler, schedule):
    """As conf/sampler has them, in 150 steps: to the error of 2048 pixels, nothing else. (On EDM, whose time is sigma,
    equal steps of t are nearly all spent on noise.)
    """
    grid = UniformLogSNR() if schedule is SCHEDULES["edm"] else sampler.grid
    sampler = replace(unbounded(sampler, 150), grid=grid)
    x = sampler(Pixels(MIXTURE), schedule, FixedSmall(), PixelNoise(4, 1)(), None, PixelNoise(4))
    close_to(x, MIXTURE)


@each_sde
def test_corrector_step_is_langevins_of_algorithms_4_and_5(schedule):
    t, s = levels(schedule, TIMES[:2])
    x, z = s.sigma * PixelNoise(3)(), PixelNoise(3, 1)()
    grad = score(x, s)
    norms = z.flatten(1).norm(dim=1) / grad.flatten(1).norm(dim=1)
    eps = (2 * (t.alpha / s.alpha) ** 2 * (0.16 * norms) ** 2)[:, None, None]
    step = steps(PredictorCorrector(Still(), 1), schedule, TIMES[:2], x, lambda: z, Pixels(MIXTURE), FixedLarge())
    assert_close(step, x + eps * grad + (2 * eps).sqrt() * z, rtol=1e-8, atol=1e-8)


def test_corrected_samples_do_not_depend_on_their_company():
    schedule, x, z = SCHEDULES["vp_sde"], PixelNoise(5)(), PixelNoise(5, 1)()
    solver = PredictorCorrector(ReverseDiffusion(), 2)
    together = steps(solver, schedule, TIMES, x, lambda: z, Pixels(MIXTURE))
    alone = torch.cat([steps(solver, schedule, TIMES, x[[i]], lambda i=i: z[[i]], Pixels(MIXTURE)) for i in range(5)])
    assert_close(together, alone, rtol=1e-12, atol=1e-12)


@each_sde
def test_corrector_leaves_the_marginal_and_leads_to_it(schedule):
    t, s = levels(schedule, [0.301, 0.3])
    marginal = Mixture(
        MIXTURE.weights, s.alpha * MIXTURE.means, s.alpha**2 * MIXTURE.covariances + s.sigma**2 * torch.eye(2)
    )
    times, corrected = torch.tensor([t.t, s.t], dtype=torch.float64), PredictorCorrector(Still(), 40, 0.15)
    x = marginal.sample(8 * 512, torch.Generator().manual_seed(0))[0].reshape(8, 512, 2)
    scale = marginal.covariance().diagonal().max().item()
    for start in (x, 0.7 * x):
        end = steps(corrected, schedule, times, start, PixelNoise(8), Pixels(MIXTURE), FixedLarge())
        close_to(end, marginal, 0.05 * scale**0.5, 0.08 * scale)
    with pytest.raises(AssertionError):
        close_to(0.7 * x, marginal, 0.05 * scale**0.5, 0.08 * scale)


def test_predictor_corrector_is_what_its_predictor_is_but_for_the_noise():
    solver = PredictorCorrector(Still(), 3)
    assert (solver.order, solver.history, solver.uses_variance, solver.init()) == (7, 3, True, 0)
    assert not PredictorCorrector(ReverseDiffusion()).uses_variance
    plans, noise, x = solver.plan(SCHEDULES["ve"], TIMES, FixedLarge()), PixelNoise(4), PixelNoise(4)()
    _, state = solver.step(lambda x, level: Pixels(MIXTURE)(x, level, None), x, plans[0], 5, noise)
    assert (len(plans), state, noise.calls) == (2, 6, 3)
    assert not any(s.deterministic for s in (solver, EulerMaruyama(), ReverseDiffusion()))


@each("solver", {str(s): s for s in (EulerMaruyama(), ReverseDiffusion(), PredictorCorrector(ReverseDiffusion()))})
def test_schedules_without_signal_are_refused(solver):
    schedule, grid = SCHEDULES["zero_terminal_snr"], UniformTime()
    with pytest.raises(ValueError, match=r"cannot serve ZeroTerminalSNR: alpha is 0 .* ancestral"):
        Sampler(solver, grid, 10).plan(schedule, FixedSmall())
    Sampler(solver, grid, 10).plan(schedule.base, FixedSmall())


def test_a_corrected_ddim_serves_them():
    sampler = Sampler(PredictorCorrector(DDIM(0.0)), UniformTime(), 10, None)
    x = sampler(Pixels(MIXTURE), SCHEDULES["zero_terminal_snr"], FixedSmall(), PixelNoise(4)(), None, PixelNoise(4))
    assert x.isfinite().all()


@each("sampler", by_solver(SAMPLERS))
def test_what_the_corrector_does_outlives_the_next_step_or_the_predictor_is_refused(sampler):
    if sampler.solver.keeps_x:
        with pytest.raises(ValueError, match=f"predictor must not be {type(sampler.solver).__name__}"):
            PredictorCorrector(sampler.solver)
        return
    num_steps = sampler.solver.history + 2
    corrected = Sampler(PredictorCorrector(sampler.solver), UniformTime(), num_steps, None)

    def second(first_noise):
        noises, seen = iter([first_noise, *(Noise(3, seed=i)() for i in range(9 * num_steps))]), []
        corrected(
            Says(torch.zeros_like),
            *(SCHEDULES["linear"], FixedSmall(), Noise(3)(), None, lambda: next(noises)),
            lambda i, x, x_0_hat: seen.append(x),
        )
        return seen[1]

    assert (second(Noise(3, seed=1)()) - second(Noise(3, seed=2)())).abs().min() > 1e-3


@pytest.mark.parametrize("wrong", [{"corrector_steps": 0}, {"signal_to_noise": 0.0}], ids=str)
def test_predictor_corrector_refuses_to_do_nothing(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(PredictorCorrector(ReverseDiffusion()), **wrong)
