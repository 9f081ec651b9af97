"""Samplers with a perfect denoiser: solvers converge to the truth at their declared order, grids are what they say.

On a Gaussian every sampler is an affine map of its noises, so the law of what it draws is known exactly (`law`),
without Monte Carlo error; on a mixture it is compared with the truth within the error of 20 000 samples.
"""

from dataclasses import replace

import pytest
import torch
from exact import GAUSSIAN, MIXTURE, ExactDenoiser
from options import built, each
from oracle import forward_posterior
from torch.testing import assert_close

from diffusion_trainer.process.variances import FixedLarge, FixedSmall
from diffusion_trainer.sampling.ancestral import Ancestral
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.grids import UniformLogSNR, UniformTime
from diffusion_trainer.sampling.sampler import Sampler

SCHEDULES = built("schedule")
CONFIGURED = built("sampler")
SAMPLERS = CONFIGURED | {f"ddim eta={eta}": Sampler(DDIM(eta), UniformTime(), 50) for eta in (0.5, 1.0)}
every_schedule = each("schedule", SCHEDULES)
every_sampler = each("sampler", SAMPLERS)
every_grid = each("grid", {"time": UniformTime(), "log_snr": UniformLogSNR()})
every_num_steps = pytest.mark.parametrize("num_steps", [1, 2, 5, 50])


class Noise:
    """Standard normal (n, 2) float64 from a seed; counts how often it is asked."""

    def __init__(self, n, seed=0):
        self.n, self.calls, self.generator = n, 0, torch.Generator().manual_seed(seed)

    def __call__(self):
        self.calls += 1
        return torch.randn(self.n, 2, generator=self.generator, dtype=torch.float64)


def unbounded(sampler, num_steps):
    return replace(sampler, num_steps=num_steps, x_0_bound=None)


def drawn(sampler, data, schedule, n, seed=0, on_step=None):
    """x_0 (n, 2) and how often noise was asked for within the loop."""
    noise = Noise(n, seed)
    x_T = noise()
    x = sampler(ExactDenoiser(data, schedule), schedule, x_T, None, noise, on_step)
    return x, noise.calls - 1


DETERMINISTIC = {
    name: s for name, s in SAMPLERS.items() if drawn(unbounded(s, 3), GAUSSIAN, SCHEDULES["cosine"], 1)[1] == 0
}


def law(sampler, schedule):
    """Exact mean (2,) and covariance (2, 2) of what it draws for Gaussian data, from exact x_T.

    Row 0 has no noise at all; each of the others has one entry of one noise set to 1.
    """
    rows, calls = 1 + 2 * (sampler.num_steps + 1), 0

    def noise():
        nonlocal calls
        z = torch.zeros(rows, 2, dtype=torch.float64)
        z[1 + 2 * calls : 3 + 2 * calls] = torch.eye(2)
        calls += 1
        return z

    t = torch.tensor(schedule.t_range[1], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    root = torch.linalg.cholesky(GAUSSIAN.covariance_t(alpha, sigma))
    x_T = (GAUSSIAN.mean_t(alpha, sigma) + noise() @ root.T) / sigma
    x = sampler(ExactDenoiser(GAUSSIAN, schedule), schedule, x_T, None, noise)
    return x[0], (x[1:] - x[0]).T @ (x[1:] - x[0])


@every_schedule
@each("sampler", DETERMINISTIC)
def test_measured_order_is_the_declared_order(sampler, schedule):
    steps, errors = torch.tensor([32.0, 64, 128, 256]), []
    for num_steps in steps.int().tolist():
        times, path = sampler.grid(schedule, num_steps), []
        x_T = Noise(64)()
        drawn(unbounded(sampler, num_steps), GAUSSIAN, schedule, 64, on_step=lambda i, x, x_0_hat, p=path: p.append(x))
        # The jump from the clean end of the range to 0 is the same at any number of steps: the path before it counts.
        (alpha_t, alpha_s), (sigma_t, sigma_s) = schedule.alpha(times[[0, -2]]), schedule.sigma(times[[0, -2]])
        truth = GAUSSIAN.probability_flow(sigma_t * x_T, alpha_t, sigma_t, alpha_s, sigma_s)
        errors.append((path[-2] - truth).norm())
    slope = torch.linalg.lstsq(
        torch.stack([steps.log(), torch.ones(4)], dim=1).double(), torch.stack(errors).log()[:, None]
    ).solution[0].item()  # fmt: skip
    assert abs(-slope - sampler.solver.order) < 0.15


def test_deterministic_samplers_are_those_of_ddim_with_eta_0():
    assert {name for name, s in CONFIGURED.items() if s.solver == DDIM(0.0)} <= set(DETERMINISTIC)
    assert not any(name.startswith(("ancestral", "ddim eta")) for name in DETERMINISTIC)


@every_schedule
@every_sampler
def test_mean_of_gaussian_data_is_exact_in_any_number_of_steps(sampler, schedule):
    for num_steps in (1, 7, 32):
        mean, _ = law(unbounded(sampler, num_steps), schedule)
        assert_close(mean, GAUSSIAN.mean(), rtol=0, atol=1e-9)


@every_schedule
@every_sampler
def test_covariance_of_gaussian_data_is_met_to_first_order_or_better(sampler, schedule):
    coarse, fine = (
        (law(unbounded(sampler, num_steps), schedule)[1] - GAUSSIAN.covariance()).norm() for num_steps in (64, 128)
    )
    assert fine < 0.06
    assert fine < 0.65 * coarse


@every_schedule
@each("sampler", {name: s for name, s in SAMPLERS.items() if name != "ddim eta=1.0"})  # equal to ancestral, see below
def test_mean_and_covariance_of_a_mixture_are_met(sampler, schedule):
    n, num_steps = 20_000, 32
    x, _ = drawn(unbounded(sampler, num_steps), MIXTURE, schedule, n)
    variances = MIXTURE.covariance().diagonal()
    # Five standard errors, and an error of the discretisation of 4 / num_steps of the larger variance.
    bias = 4 / num_steps * variances.max()
    assert ((x.mean(0) - MIXTURE.mean()).abs() < 5 * (variances / n).sqrt() + 0.3 * bias).all()
    assert ((torch.cov(x.T) - MIXTURE.covariance()).abs() < 5 * variances.max() * (2 / n) ** 0.5 + bias).all()


@every_schedule
@every_grid
def test_ddim_with_eta_1_is_ancestral_sampling_with_the_small_variance(grid, schedule):
    ddim, ancestral = (Sampler(solver, grid, 12, None) for solver in (DDIM(eta=1.0), Ancestral(FixedSmall())))
    a, calls_a = drawn(ddim, MIXTURE, schedule, 50)
    b, calls_b = drawn(ancestral, MIXTURE, schedule, 50)
    assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert calls_a == calls_b == 11  # the last step adds no noise


@every_schedule
@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()], ids=str)
def test_ancestral_step_is_the_forward_posterior_with_x_0_hat_for_x_0(variance, schedule):
    t, s = torch.tensor([0.7, 0.6], dtype=torch.float64)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = schedule.alpha(torch.stack([t, s])), schedule.sigma(torch.stack([t, s]))
    x, x_0_hat = Noise(5)(), Noise(5, seed=1)()
    mean, small = forward_posterior(x_0_hat, x, alpha_t, sigma_t, alpha_s, sigma_s)
    v = small[0, 0] if variance == FixedSmall() else sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
    step, _ = Ancestral(variance).step(lambda x, t: x_0_hat, schedule, x, t, s, None, Noise(5, seed=2))
    assert_close(step, mean + v.sqrt() * Noise(5, seed=2)(), rtol=1e-9, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_adds_eta_times_the_posteriors_noise_and_keeps_the_marginal_of_a_known_x_0(eta, schedule):
    t, s = torch.tensor([0.7, 0.6], dtype=torch.float64)
    x_0, eps = torch.tensor([[0.3, -0.8]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)

    def step(eps, z):  # from x_t = alpha_t x_0 + sigma_t eps
        x_t = schedule.alpha(t) * x_0 + schedule.sigma(t) * eps
        x_0_hat = x_0.expand_as(x_t)
        return DDIM(eta).step(lambda x, t: x_0_hat, schedule, x_t, t, s, None, lambda: z)[0]

    zero = torch.zeros(2, 2, dtype=torch.float64)
    mean, kept, added = step(zero, zero), step(eps, zero), step(zero, eps)
    assert_close(mean, (schedule.alpha(s) * x_0).expand(2, 2), rtol=0, atol=1e-12)
    covariance = (kept - mean).T @ (kept - mean) + (added - mean).T @ (added - mean)
    assert_close(covariance, schedule.sigma(s) ** 2 * eps, rtol=1e-9, atol=1e-12)
    levels = (schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s))
    beta_tilde = forward_posterior(x_0, x_0, *levels)[1][0, 0]
    assert_close(added - mean, eta * beta_tilde.sqrt() * eps, rtol=1e-9, atol=1e-12)  # eq. 16


@every_schedule
@every_sampler
def test_one_step_is_the_denoiser_at_the_noisy_end(sampler, schedule):
    x, calls = drawn(unbounded(sampler, 1), MIXTURE, schedule, 10)
    t = torch.full((10,), schedule.t_range[1], dtype=torch.float64)
    x_t = schedule.sigma(t)[:, None] * Noise(10)()
    assert_close(x, ExactDenoiser(MIXTURE, schedule)(x_t, t, None), rtol=1e-9, atol=1e-9)
    assert calls == 0


@every_schedule
@every_sampler
@every_num_steps
def test_grids_decrease_from_the_noisy_end_to_0(sampler, schedule, num_steps):
    times = sampler.grid(schedule, num_steps)
    assert (times.shape, times.dtype) == ((num_steps + 1,), torch.float64)
    assert (times[0].item(), times[-1].item()) == (schedule.t_range[1], 0)
    assert (times.diff() < 0).all()


@every_schedule
def test_uniform_log_snr_has_equal_steps_down_to_the_clean_end(schedule):
    times = UniformLogSNR()(schedule, 20)[:-1]
    steps = schedule.log_snr(times).diff()
    assert_close(steps, steps.mean().expand_as(steps), rtol=1e-6, atol=0)
    assert_close(times[-1].item(), schedule.t_range[0], rtol=1e-9, atol=0)


@every_schedule
def test_uniform_time_has_equal_steps(schedule):
    steps = UniformTime()(schedule, 20).diff()
    assert_close(steps, steps.mean().expand_as(steps), rtol=1e-9, atol=0)


@every_sampler
@pytest.mark.parametrize("num_steps", [1, 4])
def test_x_0_bound_clips_every_estimate_and_null_none(sampler, num_steps):
    schedule, estimates = SCHEDULES["cosine"], {0.1: [], None: []}
    for bound, seen in estimates.items():
        bounded = replace(sampler, num_steps=num_steps, x_0_bound=bound)
        x, _ = drawn(bounded, MIXTURE, schedule, 50, on_step=lambda i, x, x_0_hat, seen=seen: seen.append(x_0_hat))
        assert_close(x, seen[-1], rtol=0, atol=1e-12)  # it ends on its last estimate
    assert all(x_0_hat.abs().max() == 0.1 for x_0_hat in estimates[0.1])
    assert torch.equal(estimates[0.1][0], estimates[None][0].clamp(-0.1, 0.1))
    assert estimates[None][-1].abs().max() > 0.1


@every_sampler
def test_inputs_are_left_as_they_were(sampler):
    schedule, x_T, condition = SCHEDULES["cosine"], Noise(6)(), torch.arange(6) % 2
    before = x_T.clone(), condition.clone()
    denoiser = ExactDenoiser(MIXTURE, schedule)
    replace(sampler, num_steps=4)(denoiser, schedule, x_T, condition, Noise(6, seed=1))
    assert torch.equal(x_T, before[0])
    assert torch.equal(condition, before[1])


@every_sampler
@every_num_steps
def test_on_step_sees_every_step_in_order_and_the_last_is_the_result(sampler, num_steps):
    seen = []
    x, _ = drawn(
        unbounded(sampler, num_steps), GAUSSIAN, SCHEDULES["cosine"], 3, on_step=lambda *step: seen.append(step)
    )
    assert [i for i, _, _ in seen] == list(range(num_steps))
    assert torch.equal(seen[-1][1], x)


@every_sampler
def test_float32_stays_float32_and_agrees_with_float64(sampler):
    schedule, sampler = SCHEDULES["linear"], unbounded(sampler, 10)
    single, double = (
        sampler(ExactDenoiser(MIXTURE, schedule), schedule, noise().to(dtype), None, lambda n=noise, d=dtype: n().to(d))
        for dtype, noise in ((torch.float32, Noise(20)), (torch.float64, Noise(20)))
    )
    assert single.dtype == torch.float32
    assert_close(single.double(), double, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_ddim_refuses_eta_outside_0_to_1(eta):
    with pytest.raises(ValueError, match="eta"):
        DDIM(eta)


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"x_0_bound": 0.0}, {"x_0_bound": -1.0}], ids=str)
def test_sampler_refuses_no_steps_and_no_room(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampler(**({"solver": DDIM(), "grid": UniformTime(), "num_steps": 10} | wrong))
