"""Schedules: what every yaml of conf/schedule must be, and the continuous processes that ours are named after."""

import math

import pytest
import torch
from cases import each
from options import built
from torch.testing import assert_close

from diffusion_trainer.process.beta_tables import LinearBeta
from diffusion_trainer.process.schedules import EDM, Cosine, RectifiedFlow
from diffusion_trainer.process.sdes import VE, VPSDE, SubVP

SCHEDULES = {
    **built("schedule"),
    "no_signal": RectifiedFlow(t_max=1.0),
    "flat_rate": VPSDE(beta_min=12.0, beta_max=12.0),
}
every_schedule = each("schedule", {name: schedule.frozen() for name, schedule in SCHEDULES.items()})
every_dtype = each("dtype", [torch.float64, torch.float32])
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
def test_log_snr_is_strictly_decreasing_and_finite_but_for_an_end_without_signal(schedule, dtype):
    t = times(schedule, dtype)
    log_snr = schedule.log_snr(t)
    assert log_snr[:-1].isfinite().all()
    assert log_snr[-1] == -math.inf if schedule.alpha(t[-1]) == 0 else log_snr[-1].isfinite()
    assert (log_snr.diff() < 0).all()


@every_schedule
@every_dtype
def test_log_snr_is_the_log_of_the_ratio_of_variances(schedule, dtype):
    t = times(schedule, dtype)
    expected = (schedule.alpha(t).double() ** 2 / schedule.sigma(t).double() ** 2).log()
    assert_close(schedule.log_snr(t).double(), expected, rtol=1e-5, atol=1e-5)


@every_schedule
@every_dtype
def test_variance_is_preserved_where_the_schedule_says_so_and_nowhere_else(schedule, dtype):
    t = times(schedule, dtype)
    off = (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 - 1).abs().max()
    assert off < 1e-6 if schedule.variance_preserving else off > 0.1


@every_schedule
@every_dtype
def test_time_zero_is_data(schedule, dtype):
    zero = torch.zeros((), dtype=dtype)
    assert schedule.sigma(zero) == 0
    assert_close(schedule.alpha(zero), torch.ones((), dtype=dtype), rtol=0, atol=1e-7)
    assert schedule.t_of_log_snr(torch.full((), math.inf, dtype=dtype)) == 0


@every_schedule
def test_ends_of_the_range_are_almost_data_and_almost_noise(schedule):
    first, *_, last = (schedule.sigma(times(schedule)) / schedule.alpha(times(schedule))).tolist()
    assert first < 0.15  # of data in [-1, 1]; the most has a constant beta, sqrt(0.02)
    assert last > 12  # the least have the learned schedule, exp(5 / 2), and Stable Diffusion's betas


@every_schedule
def test_float32_loses_no_digits_near_the_data(schedule):
    t = torch.logspace(-6, -1, 200)  # the naive sqrt(1 - alpha^2) is wrong by a fifth at the small end
    for value in (schedule.alpha, schedule.sigma):
        assert_close(value(t).double(), value(t.double()), rtol=2e-6, atol=0)
    assert_close(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=1e-5, atol=1e-7)


@every_schedule
def test_float32_is_finite_and_signed_up_to_the_noisy_end(schedule):
    t = times(schedule, torch.float32)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert (alpha[:-1] > 0).all()
    assert alpha[-1] >= 0
    assert (sigma > 0).all()
    assert sigma.isfinite().all()


@every_schedule
@every_dtype
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_dtype_and_shape_are_kept(schedule, dtype, shape):
    for method in METHODS:
        value = getattr(schedule, method)(torch.full(shape, 0.4, dtype=dtype))
        assert (value.dtype, value.shape) == (dtype, torch.Size(shape))


@every_schedule
def test_what_is_frozen_has_nothing_to_learn_and_freezes_to_itself(schedule):
    assert schedule.learned == ()
    assert schedule.frozen() is schedule


@pytest.mark.parametrize("schedule", [Cosine(), Cosine(offset=0.1)], ids=str)
def test_cosine_is_equation_17_of_nichol_and_dhariwal(schedule):
    def f(t):
        return math.cos((t + schedule.offset) / (1 + schedule.offset) * math.pi / 2) ** 2

    t = times(schedule)
    alpha_bar = torch.tensor([f(x) / f(0) for x in t.tolist()], dtype=torch.float64)
    assert_close(schedule.alpha(t) ** 2, alpha_bar, rtol=1e-9, atol=0)


def linear_sde(t, low=0.1, high=20.0):
    """Song, Sohl-Dickstein et al. 2021, eq. 33: the mean's factor exp(-t^2 (high - low) / 4 - t low / 2), squared."""
    return (-(t**2) * (high - low) / 2 - t * low).exp()


def test_vp_sde_is_equation_33_of_song():
    t = times(VPSDE())
    assert_close(VPSDE().alpha(t) ** 2, linear_sde(t), rtol=1e-10, atol=0)
    assert_close(VPSDE().sigma(t) ** 2, 1 - linear_sde(t), rtol=0, atol=1e-12)


def test_sub_vp_has_the_mean_of_vp_and_the_square_of_its_variance_for_standard_deviation():
    t = times(SubVP())
    assert_close(SubVP().alpha(t) ** 2, linear_sde(t), rtol=1e-10, atol=0)
    assert_close(SubVP().sigma(t), 1 - linear_sde(t), rtol=0, atol=1e-12)


def test_discrete_linear_beta_tends_to_the_vp_sde():
    """Song, Sohl-Dickstein et al. 2021, appendix B: beta_k = beta(k / T) / T."""
    t = times(VPSDE())
    errors = []
    for T in (1000, 10_000):
        discrete = LinearBeta(T, 0.1 / T, 20 / T)
        errors.append((discrete.alpha(t) - VPSDE().alpha(t)).abs().max())
    assert errors[0] < 0.01
    assert errors[1] < 0.2 * errors[0]


def test_ve_is_the_growth_of_a_geometric_standard_deviation():
    t = times(VE())
    spread = 0.01 * (50 / 0.01) ** t  # Song, Sohl-Dickstein et al. 2021, eq. 30, and the kernel of eq. 29
    assert_close(VE().sigma(t) ** 2, spread**2 - 0.01**2, rtol=1e-9, atol=0)
    assert (VE().alpha(t) == 1).all()


def test_edm_is_noise_between_its_two_sigmas():
    assert_close(EDM().sigma(times(EDM()))[[0, -1]].tolist(), [0.002, 80.0], rtol=1e-12, atol=0)
    assert_close(EDM().sigma(times(EDM()).square()), 80 * times(EDM()) ** 2)
    assert (EDM().alpha(times(EDM())) == 1).all()


def test_rectified_flow_is_a_straight_line_from_data_to_noise():
    t, (x_0, eps) = times(RectifiedFlow()), torch.tensor([0.7, -1.3], dtype=torch.float64)
    x_t = RectifiedFlow().alpha(t) * x_0 + RectifiedFlow().sigma(t) * eps
    assert_close(x_t, torch.lerp(x_0, eps, t), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        *[(Cosine, {"offset": offset}, "offset") for offset in (0.0, 1.0, -0.1)],
        *[
            (Cosine, ends, "t_min < t_max < 1")
            for ends in ({"t_min": 0.0}, {"t_max": 1.0}, {"t_min": 0.5, "t_max": 0.5})
        ],
        *[(RectifiedFlow, ends, "t_min < t_max <= 1") for ends in ({"t_min": 0.0}, {"t_max": 1.1}, {"t_min": 0.999})],
        *[(sde, {"beta_min": low}, "beta_min <= beta_max") for sde in (VPSDE, SubVP) for low in (0.0, 21.0, -1.0)],
        *[(sde, {"t_min": t_min}, "t_min must lie") for sde in (VPSDE, SubVP, VE) for t_min in (0.0, 1.0)],
        *[(kind, {"sigma_min": low}, "sigma_min < sigma_max") for kind in (VE, EDM) for low in (0.0, 80.0, -0.1)],
    ],
)
def test_what_is_no_process_is_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
