"""Wrapped schedules: the shift is a shift of the log-SNR and nothing else; the rescaled one is Lin et al.'s."""

import pytest
import torch
from cases import each
from options import built
from torch.testing import assert_close

from diffusion_trainer.process.beta_tables import QuadraticBeta
from diffusion_trainer.process.learned_schedule import LearnedSchedule
from diffusion_trainer.process.schedule_wrappers import Shifted, ZeroTerminalSNR
from diffusion_trainer.process.schedules import Cosine, RectifiedFlow
from diffusion_trainer.process.sdes import VE, VPSDE

BASES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
every_base = each("base", BASES)
every_preserving_base = each("base", {n: b for n, b in BASES.items() if b.variance_preserving})
every_shift = each("shift", [0.25, 1.0, 4.0])


def times(schedule, count=500):
    return torch.linspace(*schedule.t_range, count, dtype=torch.float64)


@every_base
@every_shift
def test_shift_multiplies_the_ratio_of_noise_to_signal(base, shift):
    t, schedule = times(base)[:-1], Shifted(base, shift)
    ratio = schedule.sigma(t) / schedule.alpha(t)
    assert_close(ratio, shift * base.sigma(t) / base.alpha(t), rtol=1e-8, atol=0)
    assert_close(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=0, atol=1e-10)
    assert schedule.t_range == base.t_range


@every_base
@every_shift
def test_shift_keeps_variance_preserved_and_alpha_where_it_was_one(base, shift):
    t, schedule = times(base), Shifted(base, shift)
    assert schedule.variance_preserving == base.variance_preserving
    if base.variance_preserving:
        assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-10)
    if (base.alpha(t) == 1).all():
        assert (schedule.alpha(t) == 1).all()


@every_shift
@pytest.mark.parametrize("base", [RectifiedFlow(), RectifiedFlow(t_max=1.0)], ids=str)
def test_shift_of_rectified_flow_is_equation_23_of_esser(base, shift):
    t, schedule = times(base), Shifted(base, shift)
    moved = shift * t / (1 + (shift - 1) * t)
    assert_close(schedule.sigma(t), moved, rtol=1e-12, atol=0)
    assert_close(schedule.alpha(t), 1 - moved, rtol=1e-9, atol=1e-16)


def test_shift_of_the_cosine_is_the_log_snr_of_hoogeboom():
    """Hoogeboom et al. 2023, section 3.1: -2 log tan(pi t / 2) + 2 log(64 / 256), for the cosine without offset."""
    t = torch.linspace(0.1, 0.9, 50, dtype=torch.float64)
    expected = -2 * (torch.pi * t / 2).tan().log() + 2 * torch.tensor(64 / 256).double().log()
    assert_close(Shifted(Cosine(offset=1e-9), 4.0).log_snr(t), expected, rtol=0, atol=1e-6)


@every_preserving_base
def test_zero_terminal_is_the_line_of_lin_from_one_to_exactly_zero(base):
    t, schedule = times(base), ZeroTerminalSNR(base)
    last = base.alpha(t)[-1]
    assert_close(schedule.alpha(t), (base.alpha(t) - last) / (1 - last), rtol=0, atol=1e-12)
    for dtype in (torch.float64, torch.float32):
        end = torch.full((3,), base.t_range[1], dtype=dtype)
        assert (schedule.alpha(end) == 0).all()
        assert (schedule.sigma(end) == 1).all()
    assert_close(schedule.t_of_log_snr(torch.tensor([-torch.inf]).double()).item(), base.t_range[1], rtol=0, atol=1e-10)


def test_noise_of_zero_terminal_keeps_its_digits_near_the_data():
    base, t = QuadraticBeta(1000, 0.00085, 0.012), torch.logspace(-12, -3, 50, dtype=torch.float64)
    last = base.alpha(torch.ones((), dtype=torch.float64))
    gap = -(base.log_alpha_squared(t) / 2).expm1() / (1 - last)  # 1 - alpha'
    assert_close(ZeroTerminalSNR(base).sigma(t), (2 * gap - gap**2).sqrt(), rtol=1e-11, atol=0)


def test_zero_terminal_is_algorithm_1_of_lin_up_to_its_first_step():
    """Lin et al. 2024, algorithm 1, keeps sqrt(alpha_bar_1) where we keep alpha(0) = 1: a factor of all alphas."""
    base = QuadraticBeta(1000, 0.00085, 0.012)
    root = (1 - base.betas()).cumprod(0).sqrt()
    theirs = (root - root[-1]) * root[0] / (root[0] - root[-1])
    ours = ZeroTerminalSNR(base).alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    assert_close(theirs / theirs[0], ours / ours[0], rtol=0, atol=1e-12)
    assert_close(ours[0], root[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("base", [VE(), RectifiedFlow(), Shifted(RectifiedFlow(), 3.0)], ids=str)
def test_zero_terminal_refuses_what_does_not_preserve_variance(base):
    with pytest.raises(ValueError, match="variance preserving"):
        ZeroTerminalSNR(base)


@pytest.mark.parametrize("wrap", [lambda base: Shifted(base, 2.0), ZeroTerminalSNR])
def test_learned_bases_are_refused_and_frozen_ones_taken(wrap):
    with pytest.raises(ValueError, match="learned"):
        wrap(LearnedSchedule())
    assert wrap(LearnedSchedule().frozen()).learned == ()


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(ValueError, match="shift"):
        Shifted(VPSDE(), shift)
