"""Points of a sweep as jobs, with stand-ins for SLURM's commands."""

from pathlib import Path

import pytest
import sweeping
import tiny
from stand_ins import Commands

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps.queueing import OnSlurm, QueuedPoint
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


@pytest.mark.parametrize(
    ("state", "code"), [("COMPLETED", 0), ("PREEMPTED", 143), ("FAILED", 1), ("RUNNING", None), ("COMPLETING", None)]
)
def test_a_job_that_has_left_the_queue_has_ended_as_its_state_says(slurm, state, code):
    exits = {"COMPLETED": "0:0", "PREEMPTED": "0:15"}.get(state, "1:0")
    slurm.write("job", f"JobId=7 JobState={state} ExitCode={exits}\n")
    assert QueuedPoint(OnSlurm(), sweeping.point("a"), "7").code() == code


def test_a_job_that_is_worse_than_others_is_cancelled_once_the_controller_answers(slurm):
    job = QueuedPoint(OnSlurm(), sweeping.point("a"), "7")
    busy(slurm, "scancel")
    assert not job.prune()
    assert Commands(slurm.folder).read("cancelled") is None
    assert job.prune()
    assert slurm.read("cancelled") == "7\n"


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
