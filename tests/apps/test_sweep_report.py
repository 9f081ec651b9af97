"""The table of a sweep, while it runs and after."""

import csv
import json
from pathlib import Path

import pytest
from stand_ins import Commands

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps.places import Place, Point
from diffusion_trainer.apps.sweep_record import DONE, FAILED, PRUNED, RUNNING, STOPPED, WAITING, Record, held
from diffusion_trainer.conventions import UserError

FIDS = {"0.1": 3.0, "0.2": 1.0, "0.3": float("nan"), "0.4": 2.0, "0.5": 0.1, "0.6": 0.2}
STATES = dict(zip(FIDS, (DONE, DONE, DONE, PRUNED, FAILED, RUNNING), strict=True))


@pytest.fixture(autouse=True)
def sweep(tmp_path, monkeypatch) -> Record:
    """Six points that have left a report each, and one that has not begun; those of a failed or running one are old."""
    monkeypatch.chdir(tmp_path)
    record = Record(Path("home"), "evaluate")
    Path("home").mkdir()
    for lr in [*FIDS, "0.7"]:
        out = Path("home", f"{lr}.json")
        point = Point((f"optimizer.lr={lr}",), (), Place({}, out, out, Path("home")))
        if lr in FIDS:
            out.write_text(json.dumps({"metrics": {"fid": FIDS[lr], "accuracy": FIDS[lr] / 4}}))
        record.note(point, STATES.get(lr, WAITING), 0)
    return record


def report(capsys, *arguments: str) -> list[str]:
    assert console.run(["sweep-report", "sweep=home", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_it_counts_what_is_done_running_failed_and_not_started(capsys):
    with held(Path("home")):
        lines = report(capsys)
    assert lines[0] == "evaluate -m in home: 3 done, 1 pruned, 1 failed, 1 running, 1 not started"
    cells = [line.split()[:2] for line in lines[3:-1]]
    assert cells == [[lr, STATES.get(lr, "not")] for lr in [*FIDS, "0.7"]]
    lines = report(capsys)
    assert "1 stopped" in lines[0]  # nobody runs the sweep any more
    assert "running" not in "\n".join(lines)


def test_numbers_are_those_of_points_that_are_done_or_pruned(capsys):
    report(capsys, "out=elsewhere.csv")
    with open("elsewhere.csv", newline="") as file:
        rows = {row["optimizer.lr"]: row for row in csv.DictReader(file)}
    assert {lr for lr, row in rows.items() if row["fid"]} == {"0.1", "0.2", "0.3", "0.4"}
    assert all(float(rows[lr]["accuracy"]) == FIDS[lr] / 4 for lr in ("0.1", "0.2", "0.4"))
    assert not Path("home", "table.csv").exists()


def test_it_sorts_by_a_metric_and_says_what_is_best(capsys):
    lines = report(capsys, "sort=fid")
    assert [line.split()[0] for line in lines[3:6]] == ["0.2", "0.4", "0.1"]
    assert lines[-2] == "best fid: 1 with optimizer.lr=0.2"
    lines = report(capsys, "sort=accuracy", "direction=maximize")
    assert [line.split()[0] for line in lines[3:6]] == ["0.1", "0.4", "0.2"]
    assert lines[-2] == "best accuracy: 0.75 with optimizer.lr=0.1"
    lines = report(capsys, "sort=optimizer.lr", "direction=maximize")
    assert [line.split()[0] for line in lines[3:-2]] == ["0.7", *reversed(FIDS)]


@pytest.mark.parametrize("text", ['{"metr', "{}", '{"metrics": null}', "[]"])
def test_a_report_that_is_damaged_costs_its_own_point_alone(capsys, text):
    Path("home", "0.2.json").write_text(text)
    assert console.run(["sweep-report", "sweep=home", "sort=fid"]) == 0
    shown = capsys.readouterr()
    assert "WARNING: home/0.2.json has no metrics that can be read" in shown.err
    assert "best fid: 2 with optimizer.lr=0.4" in shown.out


def test_a_record_whose_points_are_not_key_and_value_is_named(sweep):
    path = Path("home", "sweep.json")
    path.write_text(path.read_text().replace("optimizer.lr=0.2", "optimizer.lr"))
    with pytest.raises(UserError, match=r"home/sweep.json cannot be read"):
        Record.read(Path("home"))


def test_a_search_sorts_by_its_own_metric(capsys, sweep):
    searched = Record(Path("home"), "evaluate", "study", "accuracy", "maximize")
    searched.entries = sweep.entries
    searched._write()
    assert report(capsys)[-2] == "best accuracy: 0.75 with optimizer.lr=0.1"
    assert report(capsys, "sort=fid", "direction=minimize")[-2] == "best fid: 1 with optimizer.lr=0.2"


def test_it_can_be_asked_from_anywhere(capsys, tmp_path, monkeypatch):
    here = report(capsys)
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    assert console.run(["sweep-report", "sweep=../home"]) == 0
    assert capsys.readouterr().out.splitlines()[1:-1] == here[1:-1]


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Commands:
    (tmp_path / "tools").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    commands = Commands(tmp_path / "tools")
    path = commands.folder / "scontrol"
    path.write_text(path.read_text().replace("\ncat job", '\necho "$@" >> asked; cat job'))
    return commands


def jobs(sweep: Record, **numbers: str) -> None:
    """Makes jobs that run, as an ended sweep has seen them last, of the points of these states."""
    found = {state: next(e for e in sweep.entries if e.state == state) for state in numbers}
    for state, entry in found.items():
        entry.state, entry.job = (STOPPED if state == "failed" else RUNNING), numbers[state]
    sweep._write()


def test_jobs_that_went_on_without_the_sweep_are_asked_for_once_and_their_metrics_are_there(capsys, sweep, slurm):
    jobs(sweep, done="11", pruned="12", failed="13", running="14")
    slurm.write("queue", "12|RUNNING|x\n13|PENDING|x\n")
    slurm.write("job", "JobId=11 JobState=COMPLETED ExitCode=0:0\n")
    lines = report(capsys)
    says = "1 job 11 completed, 2 done, 1 job 12 running, 1 job 13 pending, 1 job 14 completed, 1 not started"
    assert lines[0] == f"evaluate -m in home: {says}"
    assert slurm.read("asked").split("\n")[:-1] == [f"show job --oneliner {n}" for n in (11, 14)]
    with open("home/table.csv", newline="") as file:
        rows = {row["optimizer.lr"]: row["fid"] for row in csv.DictReader(file)}
    assert {lr for lr, fid in rows.items() if fid} == {"0.1", "0.2", "0.3", "0.6"}
    (slurm.folder / "job").unlink()
    slurm.write("complaint", "slurm_load_jobs error: Invalid job id specified\n")
    assert "job 11 gone  " in "\n".join(report(capsys, "sort=fid"))
    with open("home/table.csv", newline="") as file:
        assert {row["optimizer.lr"] for row in csv.DictReader(file) if row["fid"]} == {"0.1", "0.2", "0.3", "0.6"}


def test_a_queue_that_does_not_answer_is_asked_once(capsys, sweep, slurm):
    jobs(sweep, done="11", failed="13", running="14")
    (slurm.folder / "squeue").write_text("#!/bin/bash\nexit 1\n")
    assert "1 job 11, 2 done, 1 pruned, 1 stopped, 1 job 14, 1 not started" in report(capsys)[0]
    assert slurm.read("asked") is None


def test_a_table_that_cannot_be_written_is_shown_all_the_same(capsys):
    written = report(capsys)
    Path("home", "table.csv").unlink()
    Path("home", "table.csv").mkdir()
    assert console.run(["sweep-report", "sweep=home"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == written[:-1]
    assert err.startswith("WARNING: home/table.csv cannot be written (")
    with pytest.raises(UserError, match=r"home cannot be written \("):
        console.run(["sweep-report", "sweep=home", "out=home"])


def test_what_cannot_be_reported_is_explained():
    for arguments, say in {
        ("sweep=home", "sort=kid"): "sort=kid: no point has it; there is optimizer.lr, state, fid, accuracy",
        ("sweep=nowhere",): "there is no nowhere/sweep.json: give the folder of a sweep",
        ("sweep=home/sweep.json",): "there is no home/sweep.json/sweep.json: give the folder of a sweep",
        (): "sweep is missing: say sweep=runs/<name>, the folder of a sweep",
        ("swep=home",): "did you mean sweep?",
        ("sweep=home", "direction=up"): "direction=up",
    }.items():
        with pytest.raises(UserError) as error:
            console.run(["sweep-report", *arguments])
        assert say in str(error.value)
    Path("home", "sweep.json").write_text('{"verb": "train"')
    with pytest.raises(UserError, match=r"sweep\.json cannot be read"):
        console.run(["sweep-report", "sweep=home"])
