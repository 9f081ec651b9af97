"""A run goes on with another configuration only when that is asked for, and never with one that does not fit."""

import re
from pathlib import Path

import pytest
import tiny
from written_runs import config_of, write_run

from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps import train
from diffusion_trainer.apps.config import load, read
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.conventions import UserError

pytestmark = pytest.mark.slow

RUN, ALLOWED = Path("runs/digits"), "resume.allow_config_change=true"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def begun(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(RUN, config_of(shards, "num_images=64"), images=32)


def preflight(shards, *overrides):
    train.preflight(config_of(shards, "num_images=64", *overrides), 2, RUN)


def refused(shards, *overrides):
    with pytest.raises(UserError) as error:
        preflight(shards, *overrides)
    return str(error.value)


def test_a_change_is_refused_unless_it_is_allowed_and_shown_either_way(shards, capsys):
    change = ["optimizer.lr=0.5", "condition_dropout=0.2"]
    shown = "  optimizer.lr: 0.002 there, 0.5 here\n  condition_dropout: 0.1 there, 0.2 here\n"
    message = refused(shards, *change)
    assert shown in message
    assert ALLOWED in message
    preflight(shards, *change, ALLOWED)
    assert f"the configuration of {RUN} is another from here on:\n{shown}" in capsys.readouterr().out


# Of the trajectory: refused. All other keys of conf/train.yaml may change.
TRAJECTORY = {
    "seed", "precision", "batch_size", "lanes", "condition_dropout", "init_from", "data", "network", "conditioning",
    "schedule", "prediction", "weighting", "timesteps", "objective", "second_head", "optimizer", "ema",
}  # fmt: skip


def test_what_may_change_is_this_and_nothing_else(shards):
    assert set(load("train", shards, TrainConfig)) - set(folders.MAY_CHANGE) == TRAJECTORY
    assert folders.MAY_CHANGE_INSIDE == (
        "network.checkpoint_blocks", "data.sources.*.shards", "data.num_workers", "data.prefetch", "data.shards",
        "data.store", "data.damage_budget",
    )  # fmt: skip
    assert folders.MUST_STAY == ("batch_size", "optimizer._target_", "ema._target_", "ema.profiles*", "ema.main")


MAY = ["sampler.num_steps=7", "callbacks.evaluate.every_n_images=9", "data.num_workers=3", "num_images=96"]
SAID = [
    "num_images: 64 there, 96 here", "callbacks.evaluate.every_n_images: 51200 there, 9 here",
    "sampler.num_steps: 25 there, 7 here", "data.num_workers: 0 there, 3 here",
]  # fmt: skip


def test_what_may_change_is_told(shards, capsys):
    preflight(shards, *MAY)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"the configuration of {RUN} is another from here on:"
    assert sorted(lines) == sorted(f"  {line} (this may change)" for line in SAID)


def test_a_refusal_shows_what_is_refused_first(shards):
    first, *others = refused(shards, *MAY, "optimizer.lr=0.5").splitlines()[1:6]
    assert first == "  optimizer.lr: 0.002 there, 0.5 here"
    assert sorted(others) == sorted(f"  {line} (this may change)" for line in SAID)


def test_all_changes_are_kept_in_the_folder_with_where_they_begin(shards):
    config = config_of(shards, "num_images=64", *MAY, "optimizer.lr=0.5", ALLOWED)
    for _ in range(2):
        folders.write_config(RUN, config)
    head, *lines = (RUN / "config_changes.txt").read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d, from images-000000000032 on:", head)
    assert sorted(lines) == sorted(f"  {line}" for line in [*SAID, "optimizer.lr: 0.002 there, 0.5 here"])


def test_the_permission_is_no_change_itself(shards, capsys):
    preflight(shards, ALLOWED)
    folders.write_config(RUN, config_of(shards, "num_images=64", ALLOWED))
    preflight(shards)
    assert capsys.readouterr().out == ""


def test_a_run_from_before_there_was_this_key_resumes(shards):
    old = {key: value for key, value in read(RUN / "config.yaml").items() if key != "resume"}
    folders.write_config(RUN, old)
    preflight(shards)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["batch_size=16"], "batch_size: 32 there, 16 here"),
        (["ema=several"], "ema._target_: "),
        (["network.base_channels=32"], "another architecture"),
    ],
)
def test_what_does_not_fit_the_checkpoints_is_refused_all_the_same(shards, overrides, says):
    assert says in refused(shards, *overrides, ALLOWED)


def test_which_average_is_meant_by_ema_must_stay(shards):
    """The checkpoints name the others, and call this one ema."""
    folders.write_config(RUN, config_of(shards, "num_images=64", "ema=several"))
    assert "ema.main: power_10 there, power_05 here" in refused(shards, "ema=several", "ema.main=power_05", ALLOWED)


@pytest.mark.parametrize("wrong", ["resume.allow_config_change=maybe", "+resume.allow=true"])
def test_the_key_is_of_the_schema(wrong):
    with pytest.raises(UserError, match=r"resume\.allow"):
        load("train", [wrong], TrainConfig)
