"""Where drawing begins: with noise, or with a word about it."""

import pytest
from options import names

from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.parts import TrainConfig, check_sampling, warn_of_signal

LATE = [
    "sampler.grid._target_=diffusion_trainer.sampling.grids.SubSequence",
    "+sampler.grid.steps=[1,50,300]",
    "+sampler.grid.num_timesteps=1000",
    "sampler.num_steps=3",
]


def said(capsys, *overrides: str) -> str:
    config = load("train", ["experiment=digits", *overrides], TrainConfig)
    check_sampling(config)
    warn_of_signal(config)
    return capsys.readouterr().err


@pytest.mark.parametrize("schedule", names("schedule"))
def test_every_schedule_of_ours_ends_in_noise(capsys, schedule):
    assert said(capsys, f"schedule={schedule}", "prediction=v", "weighting=elbo_continuous") == ""


def test_betas_made_for_more_steps_leave_the_data_in(capsys):
    warning = said(capsys, "schedule=linear", "schedule.num_timesteps=50")  # alpha^2 = exp(-50 * .01) = .6
    assert "drawing begins at t=1 with pure noise" in warning
    assert "alpha=0.78 of the data (log-SNR 0.4" in warning


def test_a_sub_sequence_that_begins_late(capsys):
    assert "drawing begins at t=0.3 with pure noise" in said(capsys, *LATE)
