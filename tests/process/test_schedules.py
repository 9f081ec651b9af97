"""Schedules: what every yaml of conf/schedule must be, and the published processes that ours are named after."""

import math

import pytest
import torch
from options import built, each
from torch.testing import assert_close

from diffusion_trainer.process.schedules import Cosine, LinearBeta

every_schedule = each("schedule", built("schedule"))
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
METHODS = ("alpha", "sigma", "log_snr", "t_of_log_snr")


def times(schedule, dtype=torch.float64, count=2001):
    return torch.linspace(*schedule.t_range, count, dtype=torch.float64).to(dtype)


@every_schedule
@every_dtype
def test_t_of_log_snr_inverts_log_snr(schedule, dtype):
    t = times(schedule, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_close(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=0, atol=tolerance)


@every_schedule
@every_dtype
def test_log_snr_is_finite_and_strictly_decreasing(schedule, dtype):
    log_snr = schedule.log_snr(times(schedule, dtype))
    assert log_snr.isfinite().all()
    assert (log_snr.diff() < 0).all()


@every_schedule
@every_dtype
def test_log_snr_is_the_log_of_the_ratio_of_variances(schedule, dtype):
    t = times(schedule, dtype)
    expected = (schedule.alpha(t).double() ** 2 / schedule.sigma(t).double() ** 2).log()
    assert_close(schedule.log_snr(t).double(), expected, rtol=1e-5, atol=1e-5)


@every_schedule
@every_dtype
def test_variance_is_preserved(schedule, dtype):
    t = times(schedule, dtype)
    assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-6)


@every_schedule
@every_dtype
def test_time_zero_is_data(schedule, dtype):
    zero = torch.zeros((), dtype=dtype)
    assert schedule.sigma(zero) == 0
    assert_close(schedule.alpha(zero), torch.ones((), dtype=dtype), rtol=0, atol=1e-7)


@every_schedule
def test_noisy_end_of_the_range_is_almost_pure_noise(schedule):
    assert schedule.alpha(times(schedule)[-1]) < 0.01


@every_schedule
def test_float32_loses_no_digits_near_the_data(schedule):
    t = torch.logspace(-6, -1, 200)  # the naive sqrt(1 - alpha^2) is wrong by a fifth at the small end
    for value in (schedule.alpha, schedule.sigma):
        assert_close(value(t).double(), value(t.double()), rtol=2e-6, atol=0)


@every_schedule
@every_dtype
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_dtype_and_shape_are_kept(schedule, dtype, shape):
    for method in METHODS:
        value = getattr(schedule, method)(torch.full(shape, 0.4, dtype=dtype))
        assert (value.dtype, value.shape) == (dtype, torch.Size(shape))


@pytest.mark.parametrize("schedule", [LinearBeta(), LinearBeta(50, 0.001, 0.3)], ids=str)
@every_dtype
def test_linear_beta_meets_the_discrete_process_at_every_step(schedule, dtype):
    T = schedule.num_timesteps
    betas = torch.linspace(schedule.beta_first, schedule.beta_last, T, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)  # Ho et al. 2020, eq. 4
    t = (torch.arange(1, T + 1, dtype=torch.float64) / T).to(dtype)
    assert_close(schedule.alpha(t).double() ** 2, alpha_bar, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=0)


def test_linear_beta_is_geometric_in_alpha_between_the_steps():
    schedule = LinearBeta()
    k = torch.arange(1000, dtype=torch.float64)
    ends = schedule.alpha(k / 1000) * schedule.alpha((k + 1) / 1000)
    assert_close(schedule.alpha((k + 0.5) / 1000) ** 2, ends, rtol=1e-10, atol=0)


@pytest.mark.parametrize("schedule", [Cosine(), Cosine(offset=0.1)], ids=str)
def test_cosine_is_equation_17_of_nichol_and_dhariwal(schedule):
    def f(t):
        return math.cos((t + schedule.offset) / (1 + schedule.offset) * math.pi / 2) ** 2

    t = times(schedule)
    alpha_bar = torch.tensor([f(x) / f(0) for x in t.tolist()], dtype=torch.float64)
    assert_close(schedule.alpha(t) ** 2, alpha_bar, rtol=1e-9, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1.0, -0.1])
def test_cosine_refuses_its_offset_outside_0_to_1(offset):
    with pytest.raises(ValueError, match="offset"):
        Cosine(offset=offset)


@pytest.mark.parametrize("ends", [{"t_min": 0.0}, {"t_max": 1.0}, {"t_min": 0.5, "t_max": 0.5}])
def test_cosine_refuses_a_range_that_is_empty_or_touches_the_ends(ends):
    with pytest.raises(ValueError, match="t_min < t_max"):
        Cosine(**ends)


@pytest.mark.parametrize(
    "arguments",
    [{"num_timesteps": 1}, {"beta_first": 0.0}, {"beta_first": 0.03}, {"beta_last": 1.0}, {"beta_first": -0.1}],
    ids=str,
)
def test_linear_beta_refuses_what_is_no_process(arguments):
    with pytest.raises(ValueError, match=r"num_timesteps|beta"):
        LinearBeta(**arguments)
