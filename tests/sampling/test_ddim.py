"""DDIM's family of steps, and the other names that some of them go by."""

from dataclasses import replace

import pytest
import torch
from cases import each
from configured import every_schedule
from exact import MIXTURE
from oracle import forward_posterior
from solving import Noise, drawn
from torch.testing import assert_close

from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.schedules import EDM, RectifiedFlow
from diffusion_trainer.process.sdes import VE
from diffusion_trainer.process.variances import Estimate, FixedLarge, FixedSmall
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.grids import Karras, UniformTime
from diffusion_trainer.sampling.sampler import Sampler

TIMES = (0.7, 0.6)


def step(solver, schedule, x, x_0_hat, z, variance=None, times=TIMES):
    """x at times[1], from x at times[0] with a given estimate and noise."""
    (plan,) = solver.plan(schedule, torch.tensor(times, dtype=torch.float64), variance or FixedSmall())
    return solver.step(lambda x, level: Estimate(x_0_hat), x, plan, solver.init(), lambda: z)[0]


@every_schedule
@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()], ids=str)
def test_ancestral_step_is_the_forward_posterior_with_x_0_hat_for_x_0(variance, schedule):
    t, s = levels(schedule, TIMES)
    x, x_0_hat, z = (Noise(5, seed=i)() for i in range(3))
    mean, small = forward_posterior(x_0_hat, x, t.alpha, t.sigma, s.alpha, s.sigma)
    # FixedLarge: beta = Var[x_t | x_s].
    v = small if variance == FixedSmall() else t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2 + 0 * small
    assert_close(step(DDIM(eta=1.0), schedule, x, x_0_hat, z, variance), mean + v.sqrt() * z, rtol=1e-9, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_step_adds_eta_times_the_posteriors_noise_and_keeps_the_marginal_of_a_known_x_0(eta, schedule):
    t, s = levels(schedule, TIMES)
    x_0, eps = torch.tensor([[0.3, -0.8]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    zero = torch.zeros_like(eps)

    def reached(eps, z):  # from x_t = alpha_t x_0 + sigma_t eps
        return step(DDIM(eta), schedule, t.alpha * x_0 + t.sigma * eps, x_0.expand(2, 2), z)

    mean, kept, added = reached(zero, zero), reached(eps, zero), reached(zero, eps)
    assert_close(mean, (s.alpha * x_0).expand(2, 2), rtol=0, atol=1e-12)
    covariance = (kept - mean).T @ (kept - mean) + (added - mean).T @ (added - mean)
    assert_close(covariance, s.sigma**2 * eps, rtol=1e-9, atol=1e-12)
    beta_tilde = forward_posterior(x_0, x_0, t.alpha, t.sigma, s.alpha, s.sigma)[1][0, 0]
    assert_close(added - mean, eta * beta_tilde.sqrt() * eps, rtol=1e-9, atol=1e-12)  # eq. 16


@every_schedule
def test_eta_0_is_eulers_method_in_sigma_over_alpha(schedule):
    t, s = levels(schedule, TIMES)
    x, x_0_hat = Noise(5)(), Noise(5, seed=1)()
    # d(x / alpha) / d(sigma / alpha) = eps_hat (Song et al. 2021, eq. 14)
    eps_hat = (x - t.alpha * x_0_hat) / t.sigma
    expected = s.alpha * (x / t.alpha + (s.sigma / s.alpha - t.sigma / t.alpha) * eps_hat)
    assert_close(step(DDIM(eta=0.0), schedule, x, x_0_hat, None), expected, rtol=1e-9, atol=1e-9)


def test_eta_0_is_eulers_method_in_t_of_a_rectified_flow():
    x, x_0_hat = Noise(5)(), Noise(5, seed=1)()
    velocity = (x - x_0_hat) / TIMES[0]  # eps_hat - x_0_hat
    expected = x + (TIMES[1] - TIMES[0]) * velocity
    assert_close(step(DDIM(eta=0.0), RectifiedFlow(), x, x_0_hat, None), expected, rtol=1e-12, atol=1e-12)


@each("schedule", {"ve": VE(), "edm": EDM()})
def test_eta_1_is_euler_ancestral_where_alpha_is_1(schedule):
    t, s = levels(schedule, TIMES)
    x, x_0_hat, z = (Noise(5, seed=i)() for i in range(3))
    sigma_up = (s.sigma**2 * (t.sigma**2 - s.sigma**2) / t.sigma**2) ** 0.5
    sigma_down = (s.sigma**2 - sigma_up**2) ** 0.5
    expected = x + (x - x_0_hat) / t.sigma * (sigma_down - t.sigma) + sigma_up * z
    assert_close(step(DDIM(eta=1.0), schedule, x, x_0_hat, z), expected, rtol=1e-9, atol=1e-9)


@each("grid", {"time": UniformTime(), "karras": Karras()})
def test_noise_is_drawn_at_every_step_but_the_last(grid):
    sampler = Sampler(DDIM(eta=1.0), grid, 12, None)
    assert drawn(sampler, MIXTURE, VE(), 3)[1] == 11
    assert drawn(replace(sampler, solver=DDIM(eta=0.0)), MIXTURE, VE(), 3)[1] == 0


def test_the_reverse_variance_makes_a_difference_to_the_sampler():
    sampler = Sampler(DDIM(eta=1.0), UniformTime(), 5, None)
    small, large = (drawn(sampler, MIXTURE, RectifiedFlow(), 3, variance=v)[0] for v in (FixedSmall(), FixedLarge()))
    assert not torch.allclose(small, large, atol=1e-3)


@every_schedule
def test_with_eta_0_too_the_reverse_variance_adds_its_noise(schedule):
    """Analytic-DDIM: c^2 Var[x_0 | x_t] with c the coefficient of x_0_hat (Bao et al. 2022, theorem 1)."""
    t, s = levels(schedule, TIMES)
    x, x_0_hat, z = (Noise(5, seed=i)() for i in range(3))
    added = step(DDIM(), schedule, x, x_0_hat, z, FixedLarge()) - step(DDIM(), schedule, x, x_0_hat, z)
    c = s.alpha - s.sigma / t.sigma * t.alpha
    of_x_0 = FixedLarge().at(t, s)(Estimate(x_0_hat))
    assert_close(added, abs(c) * of_x_0**0.5 * z, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_0_to_1_is_refused(eta):
    with pytest.raises(ValueError, match="eta"):
        DDIM(eta)
