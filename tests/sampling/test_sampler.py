"""The loop: what holds for every sampler whatever its solver. On schedules with and without signal at the noisy end."""

from dataclasses import dataclass, replace
from math import inf, nan
from typing import ClassVar

import pytest
import torch
from cases import each
from configured import SAMPLERS, SCHEDULES, SCORE_STEPS, by_solver, every_sampler, every_schedule, fewest, served
from exact import GAUSSIAN, MIXTURE, ExactDenoiser, ExactNetwork, Says
from solving import Noise, drawn, unbounded
from torch import nn
from torch.testing import assert_close

from diffusion_trainer.conditioning.unconditional import Unconditional
from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.predictions import V
from diffusion_trainer.process.schedules import RectifiedFlow
from diffusion_trainer.process.variances import FixedLarge, FixedSmall
from diffusion_trainer.sampling.adaptive import DormandPrince
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.grids import UniformTime
from diffusion_trainer.sampling.guidance import ClassifierFree
from diffusion_trainer.sampling.predictor_corrector import PredictorCorrector
from diffusion_trainer.sampling.sampler import Sampler
from diffusion_trainer.training.model import Model

LINEAR = SCHEDULES["linear"]


@every_schedule
@each("sampler", by_solver(SAMPLERS))
def test_one_step_is_the_denoiser_at_the_noisy_end(sampler, schedule):
    if not served(sampler, schedule):
        return  # refused, see below
    x, calls = drawn(unbounded(sampler, 1), MIXTURE, schedule, 10)
    x_t = schedule.at_noisy_end.sigma * Noise(10)()
    assert_close(x, ExactDenoiser(MIXTURE)(x_t, schedule.at_noisy_end, None).x_0_hat, rtol=1e-9, atol=1e-9)
    assert calls == 0


@every_schedule
@each("sampler", {name: s for name, s in by_solver(SAMPLERS).items() if not isinstance(s.solver, SCORE_STEPS)})
def test_the_fewest_steps_end_near_the_data(sampler, schedule):
    x, _ = drawn(unbounded(sampler, fewest(sampler)), MIXTURE, schedule, 10)
    assert x.abs().max() < 4


@every_sampler
def test_schedules_without_signal_at_the_noisy_end_are_sampled_or_refused(sampler):
    schedule, sampler = RectifiedFlow(t_max=1.0), unbounded(sampler, max(fewest(sampler), 12))
    if served(sampler, schedule):
        assert drawn(sampler, MIXTURE, schedule, 200)[0].abs().max() < 6
    else:
        with pytest.raises(ValueError, match="alpha is 0"):
            sampler.plan(schedule, FixedSmall())


@every_sampler
@pytest.mark.parametrize("num_steps", [1, 5])
def test_x_0_bound_clips_every_estimate_and_null_none(sampler, num_steps):
    estimates = {0.1: [], None: []}
    for bound, seen in estimates.items():
        bounded = replace(sampler, num_steps=num_steps, x_0_bound=bound)
        x, _ = drawn(bounded, MIXTURE, LINEAR, 50, on_step=lambda i, x, x_0_hat, seen=seen: seen.append(x_0_hat))
        assert_close(x, seen[-1], rtol=0, atol=1e-12)  # it ends on its last estimate
    assert all(x_0_hat.abs().max() == 0.1 for x_0_hat in estimates[0.1])
    if num_steps == 1:
        assert torch.equal(estimates[0.1][0], estimates[None][0].clamp(-0.1, 0.1))
    assert estimates[None][-1].abs().max() > 0.1


@every_sampler
def test_inputs_are_left_as_they_were(sampler):
    x_T, condition = Noise(6)(), torch.arange(6) % 2
    before = x_T.clone(), condition.clone()
    sampler = replace(sampler, num_steps=6)
    sampler(ExactDenoiser(MIXTURE), LINEAR, FixedSmall(), x_T, condition, Noise(6, seed=1))
    assert torch.equal(x_T, before[0])
    assert torch.equal(condition, before[1])


@dataclass(frozen=True)
class Remembering(ExactDenoiser):
    """Keeps what it was given and what it gave, with copies."""

    seen: ClassVar[list] = []

    def __call__(self, x_t, level, condition):
        estimate = super().__call__(x_t, level, condition)
        for tensor in (x_t, estimate.x_0_hat):
            self.seen.append((tensor, tensor.clone()))
        return estimate


@every_sampler
def test_no_step_writes_into_what_the_denoiser_or_on_step_has_seen(sampler):
    Remembering.seen.clear()
    noises, noise, x_T = [], Noise(3, seed=1), Noise(3)()

    def remembered():
        z = noise()
        noises.append((z, z.clone()))
        return z

    def on_step(i, x, x_0_hat):
        Remembering.seen.append((x, x.clone()))

    sampler = unbounded(sampler, 7)
    sampler(Remembering(MIXTURE), LINEAR, FixedSmall(), x_T, None, remembered, on_step)
    assert all(torch.equal(tensor, copy) for tensor, copy in (*Remembering.seen, *noises))


@every_sampler
@pytest.mark.parametrize("num_steps", [1, 5, 9])
def test_on_step_sees_every_step_in_order_and_the_last_is_the_result(sampler, num_steps):
    seen = []
    x, _ = drawn(unbounded(sampler, num_steps), GAUSSIAN, LINEAR, 3, on_step=lambda *step: seen.append(step))
    assert [i for i, _, _ in seen] == list(range(num_steps))
    assert torch.equal(seen[-1][1], x)


@every_sampler
def test_float32_stays_float32_and_agrees_with_float64(sampler):
    sampler = unbounded(sampler, 10)
    single, double = (
        sampler(
            ExactDenoiser(MIXTURE), LINEAR, FixedSmall(), noise().to(dtype), None, lambda n=noise, d=dtype: n().to(d)
        )
        for dtype, noise in ((torch.float32, Noise(20)), (torch.float64, Noise(20)))
    )
    assert single.dtype == torch.float32
    assert_close(single.double(), double, rtol=2e-3, atol=2e-3)


class Half(torch.nn.Module):
    """A network whose weights, inputs and outputs are float16."""

    def __init__(self, network):
        super().__init__()
        self.network, self.one = network, torch.nn.Parameter(torch.ones((), dtype=torch.float16))

    def forward(self, x, c_noise, condition):
        return self.one * self.network(x.half().float(), c_noise).half()


def from_network(sampler, schedule, network, precision=torch.float32):
    noise = Noise(20)
    denoiser = NetworkDenoiser(network, lambda condition: condition, schedule, V(), precision)
    return sampler(denoiser, schedule, FixedSmall(), noise().float(), None, lambda: noise().float())


@each("schedule", {name: SCHEDULES[name] for name in ("linear", "ve", "edm", "rectified_flow", "learned")})
@each("sampler", by_solver(SAMPLERS))
def test_a_network_in_float16_gives_float32_samples_close_to_the_exact_ones(sampler, schedule):
    sampler, network = unbounded(sampler, 6), ExactNetwork(MIXTURE, schedule, V())
    if isinstance(sampler.solver, DormandPrince):
        sampler = replace(sampler, solver=DormandPrince(1e-2, 1e-2))
    half = from_network(sampler, schedule, Half(network), torch.float16)
    exact = from_network(sampler, schedule, network)
    assert half.dtype == torch.float32
    assert_close(half, exact, rtol=2e-3, atol=0.05)  # Euler and Maruyama on VE still are at 300
    assert not torch.equal(half, exact)


@pytest.mark.parametrize(("precision", "least"), [(torch.float16, 4.9e-4), (torch.bfloat16, 4e-3)], ids=str)
def test_tolerances_below_the_rounding_of_the_network_are_refused_before_any_call(precision, least):
    def sampler(tolerance, solver=lambda solver: solver):
        return replace(SAMPLERS["dopri5"], solver=solver(DormandPrince(tolerance, tolerance)))

    def unused(*_):
        raise AssertionError

    words = rf"rtol=1e-05 and atol=1e-05 of dopri5 cannot be met in {precision}.*precision=fp32"
    for wrong in (sampler(1e-5), sampler(1e-5, PredictorCorrector)):
        with pytest.raises(UserError, match=words):
            from_network(wrong, LINEAR, unused, precision)
    denoiser = NetworkDenoiser(unused, None, LINEAR, V(), precision)
    for direction in (sampler(1e-5).encode, sampler(1e-5).decode):
        with pytest.raises(UserError, match=words):
            direction(denoiser, LINEAR, torch.zeros(3, 2), None)
    assert from_network(sampler(least), LINEAR, Half(ExactNetwork(MIXTURE, LINEAR, V())), precision).isfinite().all()


def test_a_models_denoiser_has_its_precision():
    model = Model(nn.Identity(), Unconditional(), torch.bfloat16)
    denoiser = model.denoiser(LINEAR, V())
    assert denoiser.precision == ClassifierFree(2.0)(denoiser).precision == torch.bfloat16


@each("sampler", by_solver(SAMPLERS))
def test_too_few_steps_for_the_history_are_refused_and_the_fewest_reach_it(sampler):
    for num_steps in range(2, fewest(sampler)):
        with pytest.raises(ValueError, match=f"use at least {fewest(sampler)}"):
            replace(sampler, num_steps=num_steps)
    _, plan = replace(sampler, num_steps=fewest(sampler)).plan(LINEAR, FixedSmall())
    assert len(plan) == sampler.solver.history  # the solver's last step has as many estimates as it combines


@each("sampler", by_solver(SAMPLERS))
def test_a_variance_that_makes_no_difference_is_refused(sampler):
    if not sampler.solver.uses_variance:
        with pytest.raises(ValueError, match="no use for the reverse variance"):
            sampler.plan(LINEAR, FixedLarge())


@pytest.mark.parametrize(
    "wrong", [{"num_steps": 0}, {"x_0_bound": 0.0}, {"x_0_bound": -1.0}, {"x_0_bound": nan}], ids=str
)
def test_no_steps_and_no_room_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampler(**({"solver": DDIM(), "grid": UniformTime(), "num_steps": 10} | wrong))


def ending_on(x_0, x_0_bound=None):
    """Of a denoiser that says x_0, (3, 2)."""
    sampler = Sampler(DDIM(), UniformTime(), 4, x_0_bound=x_0_bound)
    return sampler(Says(lambda x_t: x_0), LINEAR, FixedSmall(), Noise(3)().to(x_0.dtype), None, None)


@pytest.mark.parametrize("x_0_bound", [None, 1.0])
@pytest.mark.parametrize("bad", [[nan, 0], [inf, 0], [-inf, 0], [inf, -inf]], ids=str)
def test_a_network_that_returns_nan_or_inf_is_said_to(bad, x_0_bound):
    with pytest.raises(UserError, match=r"1 of 3 samples are not finite \(DDIM on LinearBeta\)"):
        ending_on(torch.tensor([[1.0, 2.0], bad, [3.0, 4.0]]), x_0_bound)


def test_numbers_are_not_refused_because_their_sum_overflows():
    large = torch.full((3, 2), 3e38)
    assert large.sum() == inf
    assert torch.equal(ending_on(large), large)
