"""Points of a sweep as jobs, with stand-ins for SLURM's commands."""

from dataclasses import replace
from pathlib import Path

import pytest
import sweeping
import tiny
from stand_ins import Commands

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps.places import Point
from diffusion_trainer.apps.queueing import OnSlurm, QueuedPoint
from diffusion_trainer.apps.sweep_record import PRUNED, Record
from diffusion_trainer.apps.sweepers import Listed
from diffusion_trainer.conventions import UserError


@pytest.fixture(autouse=True)
def slurm(tmp_path, monkeypatch) -> Commands:
    """Stand-ins on PATH, in front of an empty folder to work in."""
    for name in ("tools", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    return Commands(tmp_path / "tools")


def busy(slurm: Commands, command: str) -> None:
    (slurm.folder / command).write_text("#!/bin/bash\necho 'slurm error: Socket timed out' >&2; exit 1\n")


def test_a_dry_run_of_a_sweep_is_refused_before_anything_is_queued(slurm, tmp_path):
    run = [*tiny.overrides(tmp_path), *tiny.NETWORK]
    slurm.write("job", "JobId=4711 JobState=FAILED ExitCode=1:0\n")  # what would be queued ends at once
    with pytest.raises(UserError, match=r"every point:\ndry_run=true is for submit: try one point with it"):
        console.run(["train", "-m", *run, "hydra/launcher=slurm", "optimizer.lr=1e-3,2e-3", "dry_run=true"])
    assert slurm.read("submitted") is None


def trained(do: str, whole: bool = False) -> Point:
    """A point of which the files say so or not."""
    point = sweeping.point(do)
    return replace(point, place=replace(point.place, complete=lambda config: whole))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("state", "code"), [("COMPLETED", 0), ("PREEMPTED", 143), ("FAILED", 1), ("CANCELLED", 143), ("GONE", 1)]
)
def test_a_job_that_has_left_the_queue_has_ended_as_its_files_or_else_its_state_say(slurm, state, code, whole):
    """One may be cancelled when it has done all: its metric is not lost to a search."""
    exits = {"COMPLETED": "0:0", "PREEMPTED": "0:15", "CANCELLED": "0:15"}.get(state, "1:0")
    slurm.write("job", f"JobId=7 JobState={state} ExitCode={exits}\n")
    assert QueuedPoint(OnSlurm(), trained("a", whole), "7").code() == (0 if whole else code)


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_a_job_that_has_not_ended_has_no_code(slurm, state):
    slurm.write("job", f"JobId=7 JobState={state} ExitCode=0:0\n")
    assert QueuedPoint(OnSlurm(), trained("a", True), "7").code() is None


def test_a_job_that_is_worse_than_others_is_cancelled_once_the_controller_answers(slurm):
    job = QueuedPoint(OnSlurm(), sweeping.point("a"), "7")
    busy(slurm, "scancel")
    assert not job.prune()
    assert Commands(slurm.folder).read("cancelled") is None
    assert job.prune()
    assert slurm.read("cancelled") == "7\n"


class Worse(Listed):
    """Its points are worse than others."""

    def is_worse(self, point):
        return True

    def ended(self, point, code, pruned):
        return PRUNED if pruned else super().ended(point, code, pruned)


def test_a_job_that_ends_after_its_sweep_was_killed_is_still_one_that_the_sweep_has_cancelled(slurm, monkeypatch):
    a = trained("a")
    script = Path("a.json").absolute() / "job.sbatch"
    slurm.write("queue", f"7|RUNNING|{script}\n")

    noted = Record.note

    def killed(record, point, state, *rest, **more):
        noted(record, point, state, *rest, **more)
        if state == PRUNED:
            raise KeyboardInterrupt

    monkeypatch.setattr(Record, "note", killed)
    with pytest.raises(KeyboardInterrupt):
        sweeping.begin(Worse([a]), OnSlurm(poll_seconds=0.01))
    monkeypatch.setattr(Record, "note", noted)
    assert slurm.read("cancelled") == "7\n"
    (slurm.folder / "squeue").write_text(f'#!/bin/bash\ncd "{slurm.folder}"\ncat queue; : > queue\n')  # it ends
    slurm.write("job", "JobId=7 JobState=CANCELLED ExitCode=0:15\n")
    assert sweeping.begin(Worse([a]), OnSlurm(poll_seconds=0.01)).codes == [0]
    assert sweeping.states() == {"do=a": "pruned"}


def test_a_queue_that_does_not_answer_is_no_failure_of_a_point(slurm, capsys):
    """Its job may be running: the same command finds it again."""
    a = sweeping.point("a")
    busy(slurm, "squeue")
    sweep = sweeping.begin(Listed([a]), OnSlurm(poll_seconds=0.01))
    assert sweep.codes == [2]
    assert sweeping.states() == {"do=a": "stopped"}
    assert "error: squeue: slurm error: Socket timed out" in capsys.readouterr().err
    Commands(slurm.folder).write("queue", f"7|RUNNING|{Path('a.json').absolute()}/job.sbatch\n")
    (slurm.folder / "squeue").write_text(f'#!/bin/bash\ncd "{slurm.folder}"\ncat queue; : > queue\n')  # it ends
    slurm.write("job", "JobId=7 JobState=COMPLETED ExitCode=0:0\n")
    assert sweeping.begin(Listed([a]), OnSlurm(poll_seconds=0.01)).codes == [0]
    assert slurm.read("submitted") is None


def test_what_a_job_is_given_to_run_on_is_beside_the_point():
    assert {"nodes", "time", "partition", "launcher"} <= {*OnSlurm().planner("train", None, None).beside}
