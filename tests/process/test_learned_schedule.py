"""The learned schedule: monotone between fixed ends whatever its parameters, differentiable, and its frozen table."""

import math

import pytest
import torch
from cases import each
from options import built
from torch.func import jvp
from torch.testing import assert_close

from diffusion_trainer.process.learned_schedule import LearnedSchedule, LogSNRTable
from diffusion_trainer.process.schedules import Schedule


def trained(seed):
    """Parameters far from where they start."""
    schedule, generator = LearnedSchedule(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter.add_(2 * torch.randn(parameter.shape, generator=generator))
    return schedule


ALL = {"initial": built("schedule")["learned"], "trained": trained(0), "again": trained(1)}
every_schedule = each("schedule", ALL)
every_dtype = each("dtype", [torch.float64, torch.float32])


def times(schedule, dtype=torch.float64, count=2001):
    return torch.linspace(*schedule.t_range, count, dtype=torch.float64).to(dtype)


@every_schedule
def test_it_decreases_between_its_two_ends(schedule):
    log_snr = schedule.log_snr(times(schedule))
    assert_close(log_snr[[0, -1]].tolist(), [13.3, -5.0], rtol=0, atol=1e-9)
    assert (log_snr.diff() < 0).all()


def test_it_starts_almost_linear_in_t_the_same_for_every_seed():
    schedule = LearnedSchedule()
    line = torch.linspace(13.3, -5, 2001, dtype=torch.float64)
    assert (schedule.log_snr(times(schedule)) - line).abs().max() < 0.05 * (13.3 + 5)
    assert_close(LearnedSchedule().state_dict(), schedule.state_dict(), rtol=0, atol=0)


@every_schedule
@every_dtype
def test_variance_is_preserved_and_time_zero_is_data(schedule, dtype):
    t = torch.linspace(0, 1, 2001, dtype=dtype)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert (alpha.dtype, sigma.dtype, schedule.log_snr(t).dtype) == (dtype,) * 3
    assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-6)
    assert (alpha[0], sigma[0], schedule.log_snr(t)[0]) == (1, 0, math.inf)
    assert_close(2 * (alpha / sigma).log()[1:], schedule.log_snr(t)[1:], rtol=1e-5, atol=1e-5)


@every_schedule
def test_below_t_min_the_snr_goes_as_the_inverse_of_t(schedule):
    t = torch.logspace(-9, -3, 20, dtype=torch.float64)
    assert_close(schedule.log_snr(t).exp() * t, torch.full_like(t, math.exp(13.3) * 1e-3), rtol=1e-9, atol=0)


@every_schedule
def test_frozen_agrees_with_the_module_and_does_not_follow_its_parameters(schedule):
    t = torch.cat([torch.logspace(-8, -3, 50).double(), times(schedule, count=7919)])  # off the points of the table
    frozen, before = schedule.frozen(), schedule.log_snr(t).detach()
    assert_close(frozen.log_snr(t), before, rtol=0, atol=1e-4)
    assert_close(schedule.t_of_log_snr(before), t, rtol=0, atol=1e-5)
    assert not frozen.log_snr(t).requires_grad
    with torch.no_grad():
        schedule.bias_2.add_(0.5)
        assert (schedule.log_snr(t) - before).abs().max() > 1e-3
        assert_close(frozen.log_snr(t), before, rtol=0, atol=1e-4)
        schedule.bias_2.sub_(0.5)


@every_schedule
def test_frozen_inverts_itself_far_below_t_min(schedule):
    frozen, t = schedule.frozen(), torch.logspace(-9, 0, 500, dtype=torch.float64)
    assert_close(frozen.t_of_log_snr(frozen.log_snr(t)), t, rtol=1e-9, atol=0)


@every_schedule
def test_slope_in_t_is_that_of_finite_differences_and_trains_every_parameter(schedule):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    _, slope = jvp(schedule.log_snr, (t,), (torch.ones_like(t),))
    differences = (schedule.log_snr(t + 1e-6) - schedule.log_snr(t - 1e-6)) / 2e-6
    assert_close(slope, differences, rtol=1e-5, atol=1e-5)
    schedule.zero_grad()
    slope.square().mean().backward()  # the mean of the slope alone is fixed by the ends
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in schedule.parameters())


def test_gradient_of_the_slope_is_that_of_finite_differences():
    schedule, t = trained(2).double(), torch.linspace(0.01, 0.99, 7, dtype=torch.float64)

    def loss():
        _, slope = jvp(schedule.log_snr, (t,), (torch.ones_like(t),))
        return slope.square().mean()

    loss().backward()
    for parameter in schedule.parameters():
        at = parameter.grad.abs().argmax()
        with torch.no_grad():
            values = []
            for step in (1e-5, -2e-5):
                parameter[at] += step
                values.append(loss())
            parameter[at] += 1e-5
        assert_close(parameter.grad[at], (values[0] - values[1]) / 2e-5, rtol=1e-4, atol=1e-6)


@every_dtype
def test_gradients_are_finite_where_sigma_is_zero(dtype):
    schedule = LearnedSchedule()
    t = torch.tensor([0.0, 0.0005, 0.5, 1.0], dtype=dtype)
    (schedule.alpha(t) + schedule.sigma(t)).sum().backward()
    assert all(p.grad.isfinite().all() for p in schedule.parameters())


def test_it_trains_to_another_schedule():
    """By gradient descent on the log-SNR, to that of the cosine's shape: the parameters reach what they should."""
    schedule, t = LearnedSchedule(), torch.linspace(0.001, 1, 101)
    target = 13.3 - 18.3 * (0.5 - 0.5 * (math.pi * (t - 0.001) / 0.999).cos())
    optimizer = torch.optim.Adam(schedule.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (schedule.log_snr(t) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_every_value_passes_through_the_hooks_of_the_module():
    """ZeRO-3 gathers parameters there."""
    schedule, calls = LearnedSchedule(), []
    schedule.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    for count, method in enumerate((schedule.alpha, schedule.sigma, schedule.log_snr, schedule.t_of_log_snr), 1):
        method(torch.tensor([0.5]))
        assert len(calls) == count
    schedule.frozen()
    assert len(calls) == 5


def test_it_is_a_schedule_that_names_itself_as_what_is_learned():
    schedule = LearnedSchedule()
    assert isinstance(schedule, Schedule)
    assert schedule.learned == (schedule,)
    assert sum(p.numel() for p in schedule.parameters()) == 3 * 64 + 1


def test_autocast_does_not_touch_it():
    schedule, t = trained(3), torch.linspace(0.001, 1, 100)
    exact = schedule.log_snr(t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(schedule.log_snr(t), exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_snr_first": -5.0}, "log_snr_first must exceed"),
        ({"features": 0}, "features"),
        ({"t_min": 0.0}, "t_min"),
        ({"t_min": 1.0}, "t_min"),
    ],
)
def test_what_is_no_schedule_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearnedSchedule(**arguments)


@pytest.mark.parametrize("table", [[1.0, 1.0], [1.0, 2.0], [math.inf, 1.0], [math.nan, 1.0], [1.0], [[2.0, 1.0]]])
def test_a_table_that_does_not_decrease_is_refused(table):
    with pytest.raises(ValueError, match="table must be"):
        LogSNRTable(torch.tensor(table, dtype=torch.float64), 0.001)
