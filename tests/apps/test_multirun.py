"""Sweeps: what is checked before the first point starts, and what becomes of all."""

import csv
import json
import shutil
import signal
from pathlib import Path

import pytest
import sweeping
import yaml
from conftest import SMALL
from sweeping import point, run, started

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps import launchers, multirun, train
from diffusion_trainer.apps.config import value_of
from diffusion_trainer.apps.launchers import Local
from diffusion_trainer.apps.places import Place, Point, label
from diffusion_trainer.apps.planning import Planner
from diffusion_trainer.apps.sweep_record import DONE, FAILED, Record
from diffusion_trainer.apps.sweep_report import table
from diffusion_trainer.apps.sweepers import Listed
from diffusion_trainer.conventions import UserError


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launchers, "COMMAND", sweeping.stand_in(tmp_path))


@pytest.fixture(autouse=True)
def heard():
    """SIGINT means something here, also where the tests run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def finished(**keys):
    """A verb's show, for a checkpoint that exists."""
    return lambda overrides: yaml.safe_dump({"checkpoint": "runs/x", "out": value_of(overrides, "out"), **keys})


DIGITS = ["experiment=digits", "data.shards=shards/*.tar"]


# ---- checks ----------------------------------------------------------------------------------------------------------


def test_all_mistakes_of_all_points_are_said_before_one_starts(monkeypatch):
    monkeypatch.setattr(Local, "start", lambda *_: pytest.fail("a point was started"))
    monkeypatch.setattr(train, "check", train.show)  # test_multirun_checks.py has what it finds with data
    with pytest.raises(UserError) as error:
        console.run(["train", *DIGITS, "-m", "optimizer.lr=0.1,fast", "num_images=5,many"])
    message = str(error.value)
    assert "optimizer.lr=0.1 num_images=many:\nnum_images=many: input should be a valid integer" in message
    assert "optimizer.lr=fast num_images=5:\noptimizer.lr=fast: input should be a valid number" in message
    assert "optimizer.lr=0.1 num_images=5" not in message
    with pytest.raises(UserError) as error:
        console.run(["train", *DIGITS, "--multirun", "seed=0,1", "optimizer.lrr=1"])
    assert "every point:\noptimizer.lrr=1: there is no option optimizer.lrr" in str(error.value)
    assert str(error.value).count("optimizer.lrr=1") == 1


def test_flags(monkeypatch):
    with pytest.raises(UserError, match=r"optimizer.lr=1,2: several values are a sweep; add -m"):
        console.run(["train", *DIGITS, "optimizer.lr=1,2"])
    for wrong in (["-m", "--config"], ["-m", "-m"], ["-x"]):
        with pytest.raises(UserError, match="no such flag; the flags are --help, --config and -m"):
            console.run(["train", *wrong, "seed=0,1"])
    with pytest.raises(UserError, match="export does not sweep; train, evaluate, likelihood, sample do"):
        multirun.main("export", finished(), ["seed=0,1"])
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="2 processes were started; start a sweep once"):
        console.run(["train", *DIGITS, "-m", "seed=0,1"])


# ---- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("command")
def test_a_failing_point_stops_no_other_and_each_is_announced_before_its_output(capfd):
    points = [point("a"), point("fail3"), point("die"), point("b")]
    assert run(*points) == ([0, 3, 137, 0], 0)
    lines = ["[1/4] do=a", "did a", "[2/4] do=fail3", "what fail3 says", "[3/4] do=die", "[4/4] do=b", "did b"]
    assert capfd.readouterr().out.splitlines() == lines


@pytest.mark.usefixtures("command")
def test_ctrl_c_reaches_the_running_point_and_starts_no_other():
    before = signal.getsignal(signal.SIGINT)
    points = [point("a"), point("interrupt"), point("b")]
    assert run(*points) == ([0, 130], signal.SIGINT)
    assert started() == ["a", "interrupt"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("command")
def test_the_end_of_a_login_session_reaches_the_running_point():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    try:
        assert run(point("hang up"), point("b")) == ([128 + signal.SIGHUP], signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("command")
def test_a_signal_that_is_ignored_stays_ignored():
    """nohup ignores SIGHUP; a script's background job SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(point("poke"), point("a")) == ([0, 0], 0)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("dos", "code", "say"),
    [
        (["a", "b"], 0, ["2 of 2 points are done"]),
        (["a", "fail3", "fail4"], 3, ["1 of 3", "[2/3] do=fail3 failed with exit code 3", "[3/3] do=fail4 failed"]),
        (["fail3", "interrupt", "b"], 130, ["0 of 3", "[1/3] do=fail3 failed", "[3/3] do=b was not started"]),
    ],
)
@pytest.mark.usefixtures("command")
def test_the_exit_code_and_the_summary(capsys, monkeypatch, dos, code, say):
    monkeypatch.setattr(Planner, "points", lambda *_: [point(do) for do in dos])
    assert multirun.main("evaluate", finished(), ["do=any,other"]) == code
    output = capsys.readouterr().out
    for text in say:
        assert text in output
    assert "written to home/table.csv" in output


# ---- the table -------------------------------------------------------------------------------------------------------


def swept_point(folder: Path, metrics: dict | None, *swept: str) -> Point:
    out = folder / f"{label(swept)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if metrics is not None:
        out.write_text(json.dumps({"metrics": metrics}))
    return Point(swept, swept, Place({}, out, out, folder))


def recorded(points: list[Point], *states: tuple[str, int]) -> Record:
    record = Record(Listed(points).home, "evaluate")
    record.begin(points)
    for p, (state, code) in zip(points, states, strict=False):
        record.note(p, state, code)
    return record


@pytest.fixture
def four(tmp_path, monkeypatch) -> Record:
    monkeypatch.chdir(tmp_path)
    points = [
        swept_point(Path("run/multirun"), {"fid": 1 / 3, "accuracy": 0.25}, "eta=0", "+shape=[1,2]"),
        swept_point(Path("run/multirun"), {"fid": 1234.5678, "accuracy": 0.5}, "eta=0.5", "+shape=[3]"),
        swept_point(Path("run/multirun"), {"fid": 99.0}, "eta=1", "+shape=[3]"),  # failed: that report is an old one
        swept_point(Path("run/multirun"), {"fid": 98.0}, "eta=2", "+shape=[3]"),  # never started
    ]
    return recorded(points, (DONE, 0), (DONE, 0), (FAILED, 1))


def test_the_table_is_aligned_and_its_csv_exact(four):
    assert table(four).splitlines() == [
        "eta  shape        state     fid  accuracy",
        "  0  [1,2]         done  0.3333      0.25",
        "0.5    [3]         done    1235       0.5",
        "  1    [3]       failed                  ",
        "  2    [3]  not started                  ",
        "written to run/multirun/table.csv",
    ]
    with open("run/multirun/table.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["eta", "shape", "state", "fid", "accuracy"],
        ["0", "[1,2]", "done", str(1 / 3), "0.25"],
        ["0.5", "[3]", "done", "1234.5678", "0.5"],
        ["1", "[3]", "failed", "", ""],
        ["2", "[3]", "not started", "", ""],
    ]
    assert not list(Path("run/multirun").glob(".*.part"))


def test_points_in_several_runs_and_without_metrics_have_one_table_above_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    points = [swept_point(Path("runs") / name / "multirun", None, f"name={name}") for name in "ab"]
    found = table(recorded(points, (DONE, 0), (DONE, 0))).splitlines()
    assert found == ["name  state", "   a   done", "   b   done", "written to runs/table.csv"]


# ---- the product -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_of_evaluations_of_a_sweep_of_runs(cli, workplace, trained):
    small = [*SMALL, "strategy=single", "num_images=32"]
    code, output = cli("train", "-m", "experiment=digits", *small, "optimizer.lr=0.001,0.002")
    assert code == 0, output
    in_order = ["[1/2] optimizer.lr=0.001", "run digits/optimizer.lr-0.001 in ", "[2/2] optimizer.lr=0.002"]
    assert sorted(in_order, key=output.index) == in_order
    with (workplace / "runs" / "digits" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, lr in zip(rows, ("0.001", "0.002"), strict=True):
        run = workplace / "runs" / "digits" / f"optimizer.lr-{lr}"
        assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == float(lr)
        metrics = json.loads((run / "metrics.json").read_text())["metrics"]
        assert row == {"optimizer.lr": lr, "state": "done", **{name: str(value) for name, value in metrics.items()}}

    shutil.copytree(trained / "runs" / "digits", workplace / "runs" / "other")
    code, output = cli("evaluate", "--multirun", "checkpoint=runs/other", "sampler.solver.eta=0,2")
    assert code == 2, output
    assert "nothing was started" in output
    arguments = ["checkpoint=runs/other", "sampler.solver.eta=0,1", "sampler.num_steps=2,3"]
    blocked = workplace / "runs" / "other" / "multirun" / "evaluate"
    for steps in (2, 3):  # what only shows when it is written
        (blocked / f"sampler.solver.eta-1+sampler.num_steps-{steps}.json").mkdir(parents=True)
    code, output = cli("evaluate", "--multirun", *arguments)
    assert code == 2, output
    assert "2 of 4 points are done" in output
    assert "[3/4] sampler.solver.eta=1 sampler.num_steps=2 failed with exit code 2" in output
    assert "[4/4] sampler.solver.eta=1 sampler.num_steps=3 failed with exit code 2" in output
    with (workplace / "runs" / "other" / "multirun" / "evaluate" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["fid"]) for row in rows] == [True, True, False, False]
    for row, steps in zip(rows[:2], (2, 3), strict=True):
        name = f"sampler.solver.eta-0+sampler.num_steps-{steps}.json"
        report = json.loads((workplace / "runs" / "other" / "multirun" / "evaluate" / name).read_text())
        assert report["provenance"]["sampler"]["num_steps"] == steps
        assert row["fid"] == str(report["metrics"]["fid"])
