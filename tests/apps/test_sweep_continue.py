"""A sweep that was killed goes on where it was: the same command, the same table."""

import json
import os
import signal
from pathlib import Path

import pytest
import sweeping
import tiny
from sweeping import point, run, started, states
from written_runs import config_of, write_run

from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps import launchers
from diffusion_trainer.apps.completion import trained
from diffusion_trainer.apps.multirun import grouped
from diffusion_trainer.apps.places import Place, Point
from diffusion_trainer.apps.sweep_record import Record, held
from diffusion_trainer.apps.sweep_report import table
from diffusion_trainer.conventions import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launchers, "COMMAND", sweeping.stand_in(tmp_path))


def rows() -> list[str]:
    return table(Record.read(Path("home"))).splitlines()


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_and_ends_with_the_table_of_one_that_was_not():
    points = [point(do) for do in ("a", "fail3", "once", "b")]
    assert sweeping.killed(*points) == -signal.SIGKILL
    assert states() == {"do=a": "done", "do=fail3": "failed", "do=once": "running", "do=b": "not started"}
    assert [row.split()[1] for row in rows()[1:5]] == ["done", "failed", "stopped", "not"]
    assert run(*points) == ([0, 3, 0, 0], 0)
    # The point that was running has stopped before anything else begins; what is done is not done again.
    assert started() == ["a", "fail3", "once", "stopped", "fail3", "once", "b"]
    continued = rows()
    for path in (Path("home", "sweep.json"), *Path().glob("*.json")):
        path.unlink()
    assert run(*points) == ([0, 3, 0, 0], 0)
    assert continued == rows()
    assert run(*points) == ([0, 3, 0, 0], 0)
    assert started()[-1] == "fail3"


def test_two_sweeps_are_not_in_one_folder_at_a_time():
    with held(Path("home")), pytest.raises(UserError, match="another process is running a sweep in home; wait for it"):
        run(point("a"))
    assert run(point("a")) == ([0], 0)


def test_only_what_was_done_with_the_same_configuration_is_done():
    run(point("a", seed=0), point("b", seed=0))
    run(point("a", seed=0), point("b", seed=1))
    assert started() == ["a", "b", "b"]
    Path("a.json").unlink()
    run(point("a", seed=0), point("b", seed=1))
    assert started() == ["a", "b", "b", "a"]


def test_what_another_sweep_in_the_folder_has_done_stays_done():
    run(point("a"), point("b"))
    run(point("c"))
    assert states() == {"do=c": "done"}
    run(point("c"), point("b"))
    assert states() == {"do=c": "done", "do=b": "done"}
    assert started() == ["a", "b", "c"]


def test_a_checkpoint_that_has_become_another_is_measured_again():
    manifest = Path("runs/x/manifest.json")
    manifest.parent.mkdir(parents=True)
    for text in ("one", "one", "other"):
        manifest.write_text(text)
        run(point("a", checkpoint="runs/x"))
    assert started() == ["a", "a"]


def test_the_points_of_a_sweep_are_one_group_in_wandb_unless_it_has_a_name(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    run(point("a"))
    assert "WANDB_RUN_GROUP" not in os.environ
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    run(point("b"))
    assert os.environ["WANDB_RUN_GROUP"] == "mine"
    assert [line.split()[2] for line in Path("started").read_text().splitlines()] == ["home", "mine"]
    with grouped("other"):
        assert os.environ["WANDB_RUN_GROUP"] == "mine"


def test_a_folder_that_cannot_be_written_is_said_before_anything_starts():
    Path("home").write_text("a file")
    with pytest.raises(UserError, match=r"home cannot be written .* nothing was started"):
        run(point("a"))
    assert not Path("started").exists()


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


def finished(shards, *overrides: str) -> dict:
    """The configuration of a run of one step that has come to its end."""
    config = config_of(shards, "strategy=single", "num_images=32", *overrides)
    folder = Path(config["folder"])
    write_run(folder, config)
    folders.write_config(folder, config)
    record = {"images_seen": 32, "weights": "ema", "fid": 1.0}
    (folder / "metrics.json").write_text(json.dumps({"metrics": {"fid": 1.0}, "images_seen": 32, "history": [record]}))
    return config


def test_a_run_is_done_when_it_has_seen_all_images_and_written_its_last_evaluation(shards):
    config = finished(shards)
    report = Path(config["folder"]) / "metrics.json"
    assert trained(config)
    assert trained(config | {"nodes": 2})  # a job's own keys are not the run's
    assert not trained(config | {"seed": 1})
    assert not trained(config | {"folder": "runs/another"})
    more = config | {"num_images": 33}  # half a step: rounded up to one more
    folders.write_config(Path(config["folder"]), more)
    assert not trained(more)
    folders.write_config(Path(config["folder"]), config)
    report.write_text(json.dumps({"metrics": {}, "images_seen": 0, "history": [{"images_seen": 0}]}))
    assert not trained(config)
    report.unlink()
    assert not trained(config)
    without = config | {"callbacks": config["callbacks"] | {"evaluate": None}}
    folders.write_config(Path(config["folder"]), without)
    assert trained(without)


def test_a_run_whose_checkpoint_is_damaged_is_not_done(shards):
    config = finished(shards, "name=damaged")
    (path,) = Path(config["folder"]).glob("checkpoints/images-*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert not trained(config)


def test_a_finished_run_is_not_started_by_a_sweep(shards):
    config = finished(shards, "name=whole")
    out = Path(config["folder"])
    place = Place({}, out, out / "metrics.json", Path("home"), trained)
    runs = Point(("do=train",), ("do=train", "out=none.json"), place, config)
    assert run(runs, point("a")) == ([0, 0], 0)
    assert started() == ["a"]
    assert rows() == [
        "   do  state     fid",
        "train   done       1",
        "    a   done  0.3333",
        "written to home/table.csv",
    ]
