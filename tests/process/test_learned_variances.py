"""Variances that networks give: within bounds, the paper's interpolation, and never less than what a step keeps."""

from math import inf, log

import pytest
import torch
from cases import each
from options import built
from torch.testing import assert_close

from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.variances import Estimate, Learned, NoiseVariance, ReverseStep, transition_variance

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
every_schedule = each("schedule", SCHEDULES)
SECOND = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(1, 3, 7)


def steps(schedule, counts=(2, 10, 1000)):
    """(t, s) of floats: neighbours of equal steps, the last of them to 0."""
    for count in counts:
        times = torch.linspace(schedule.t_range[1], 0, count + 1, dtype=torch.float64)
        for i in {0, 1, count // 2, count - 2, count - 1}:
            yield tuple(levels(schedule, times[i : i + 2]))


def of(second):
    return Estimate(torch.zeros_like(second), second)


@every_schedule
def test_steps_variance_is_equation_15_between_beta_tilde_and_beta(schedule):
    for t, s in steps(schedule):
        beta, kept = transition_variance(t, s), ReverseStep.of(t, s).kept
        if kept:
            f = (SECOND + 1) / 2
            known = torch.exp(f * log(beta) + (1 - f) * log(kept))
            given = ReverseStep.of(t, s).variance(Learned().at(t, s)(of(SECOND)))
            assert_close(given, known, rtol=1e-9, atol=0)
            assert_close(Learned().of_step(t, s)(of(SECOND)), known, rtol=1e-9, atol=0)
            assert_close(given.flatten()[[0, -1]], torch.tensor([kept, beta], dtype=torch.float64), rtol=1e-9, atol=0)


@every_schedule
def test_the_last_step_lies_between_half_of_beta_and_beta(schedule):
    for t, s in steps(schedule):
        if not s.sigma:
            given = ReverseStep.of(t, s).variance(Learned().at(t, s)(of(SECOND)))
            assert_close(given, transition_variance(t, s) * 2 ** ((SECOND - 1) / 2))


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_is_never_below_what_the_step_keeps_whatever_the_second_output(schedule, dtype):
    second = torch.linspace(-3, 3, 50, dtype=dtype).reshape(1, 50)
    for t, s in steps(schedule):
        given = Learned().at(t, s)(of(second))
        assert given.dtype == dtype
        assert given.isfinite().all()
        assert (given >= 0).all()
        assert (given.diff() >= 0).all()


@every_schedule
def test_levels_of_a_batch_give_what_floats_do(schedule):
    """As training and sampling ask."""
    pairs = list(steps(schedule))
    t, s = (Level(*torch.tensor([list(p[k]) for p in pairs], dtype=torch.float64).T[:, :, None]) for k in (0, 1))
    second = torch.linspace(-1, 1, 7, dtype=torch.float64).expand(len(pairs), 7)
    together = Learned().of_step(t, s)(of(second))
    for i, (one_t, one_s) in enumerate(pairs):
        assert_close(together[i], Learned().of_step(one_t, one_s)(of(second[i])), rtol=1e-9, atol=0)


@every_schedule
def test_noise_variance_is_scaled_to_x_0_and_kept_within_its_bound(schedule):
    second = torch.linspace(-0.5, 2, 11, dtype=torch.float64).reshape(1, 11)
    for t, s in steps(schedule):
        for bound in (None, 0.5, 1.0):
            given = NoiseVariance(bound).at(t, s)(of(second))
            if not t.alpha:
                assert given == (bound or 0)
                continue
            free = second * (t.sigma / t.alpha) ** 2
            assert_close(given, free.clamp(0, inf if bound is None else bound), rtol=1e-9, atol=0)


def test_variances_of_conf_say_which_objectives_they_need():
    variances = built("variance")
    assert {name: bool(v.trained_by) for name, v in variances.items()} == {
        "analytic": False, "analytic_diagonal": False, "beta": False, "beta_tilde": False,
        "learned": True, "npr": True, "sn": True,
    }  # fmt: skip
