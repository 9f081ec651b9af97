"""Levels: the schedule's numbers as floats, and back from the log-SNR."""

from math import inf, log

import pytest
import torch
from cases import each
from options import built
from torch.testing import assert_close

from diffusion_trainer.process.levels import Level, level_of_log_snr, levels

every_schedule = each("schedule", {name: schedule.frozen() for name, schedule in built("schedule").items()})


@every_schedule
def test_levels_are_the_floats_of_the_schedule(schedule):
    t = torch.linspace(*schedule.t_range, 11, dtype=torch.float64)
    out = levels(schedule, t)
    assert all(type(value) is float for level in out for value in level)
    assert_close(torch.tensor(out, dtype=torch.float64), torch.stack(schedule.level(t), 1), rtol=0, atol=0)
    assert levels(schedule, t.tolist()) == out


@every_schedule
def test_levels_at_float32_times_are_computed_in_float64(schedule):
    t = torch.linspace(*schedule.t_range, 11)
    assert levels(schedule, t) == levels(schedule, t.double())
    assert levels(schedule, []) == []


@every_schedule
def test_log_snr_is_that_of_the_schedule(schedule):
    t = torch.linspace(*schedule.t_range, 11, dtype=torch.float64)
    own = torch.tensor([level.log_snr for level in levels(schedule, t)], dtype=torch.float64)
    assert_close(own, schedule.log_snr(t), rtol=1e-9, atol=1e-9)
    half = torch.tensor([level.half_log_snr for level in levels(schedule, t)], dtype=torch.float64)
    assert_close(2 * half, own, rtol=0, atol=0)


@every_schedule
def test_level_of_a_log_snr_has_it(schedule):
    for level in levels(schedule, torch.linspace(*schedule.t_range, 11)[:-1]):
        found = level_of_log_snr(schedule, level.log_snr)
        assert found.log_snr == pytest.approx(level.log_snr, abs=1e-7)
        assert found.t == pytest.approx(level.t, rel=1e-6)


@every_schedule
def test_data_is_at_infinite_log_snr(schedule):
    (data,) = levels(schedule, [0.0])
    assert (data.alpha, data.sigma, data.log_snr) == (1.0, 0.0, inf)


def test_log_snr_without_signal_or_noise_is_infinite():
    assert Level(1.0, 0.0, 1.0).half_log_snr == Level(1.0, 0.0, 1.0).log_snr == -inf
    assert Level(0.0, 1.0, 0.0).half_log_snr == inf
    assert Level(0.5, 0.6, 0.2).log_snr == pytest.approx(log(9))
