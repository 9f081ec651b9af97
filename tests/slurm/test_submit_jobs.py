"""diffusion-trainer submit on a real SLURM of two nodes on this machine."""

import os
import re
import signal
import tempfile
from pathlib import Path

import cluster_jobs
import pytest
from cluster_jobs import WHOLE, newest_row, rank_of, until
from conftest import ROOT, SMALL, command, finish
from undisturbed import check_nothing_lost

from diffusion_trainer.apps.jobs import Slurm
from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = cluster_jobs.MARKS
RUN = [
    "experiment=digits", *SMALL, "strategy=zero2", "callbacks.evaluate=null", "callbacks.checkpoint.every_n_images=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory() as place, cluster_jobs.local_cluster(Path(place)) as cluster:
        yield cluster


@pytest.fixture
def submit(cluster, folder):
    """submit(*arguments, run=of the run) -> exit code and output, from the folder of the module's runs."""
    paths = f"{ROOT / 'tests'}:{ROOT / 'tests' / 'slurm'}"
    env = {"SLURM_CONF": str(cluster.conf), "PYTHONPATH": paths}
    here = ["submit", "launcher=local_cluster", "doctor=false"]
    return lambda *arguments, run=RUN: finish(command(*here, *run, *arguments, cwd=folder, **env))


def number_of(output: str) -> str:
    found = re.search(r"^job (\d+) is submitted", output, re.MULTILINE)  # after what has changed, where something has
    assert found, output
    return found[1]


def ended(cluster, folder: Path, name: str, number: str) -> tuple[dict[str, str], str]:
    """What SLURM says of a job that has ended, and its log."""
    path = folder / "runs" / name / "logs" / f"slurm-{number}.log"
    return cluster_jobs.over(cluster, number, lambda: path.read_text(errors="replace") if path.is_file() else "")


def test_variables_of_a_profile_do_not_overrule_what_was_shown(cluster, folder, submit, monkeypatch):
    """sbatch lets them overrule a script. Without a requeue the run would not come back."""
    given = {"PARTITION": "main", "TIMELIMIT": "1", "NO_REQUEUE": "1", "SIGNAL": "USR1@5", "OPEN_MODE": "truncate"}
    for name, value in given.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    code, output = submit("partition=high", "time=02:00:00", "name=profile", "+sbatch_options.hold=true")
    assert "in partition high, 02:00:00 at a time" in output
    assert code == 0, output
    number = number_of(output)
    job = cluster.job(number)
    assert (job["Partition"], job["TimeLimit"], job["Requeue"]) == ("high", "02:00:00", "1")
    assert "StdOut" in job
    cluster.run("scancel", number)


def test_one_command_trains_on_two_nodes_goes_on_and_says_when_it_is_done(cluster, folder, submit):
    """From the first to the last: submitted, refused while it waits, done, refused when changed, resumed."""
    code, output = submit("num_images=320", "+sbatch_options.hold=true")
    assert code == 0, output
    number = number_of(output)
    code, output = submit("num_images=320")
    assert code == 2, output
    assert f"job {number} of run digits" in output
    cluster.run("scontrol", "release", number)
    job, log = ended(cluster, folder, "digits", number)
    assert (job["JobState"], job["NumNodes"], job["Command"]) == (
        "COMPLETED", "2", str(folder / "runs" / "digits" / "job.sbatch"),
    ), log  # fmt: skip
    assert "ZeRO-2 on 2 cpu processes" in log

    code, output = submit("num_images=320")
    assert code == 0
    assert "is done, at 320 images" in output
    code, output = submit("num_images=480", "optimizer.lr=0.5")
    assert code == 2
    assert "optimizer.lr: 0.002 there, 0.5 here" in output
    code, output = submit("num_images=480", "doctor=true")
    assert "resuming from images-000000000320" in output
    job, log = ended(cluster, folder, "digits", number_of(output))
    assert job["JobState"] == "COMPLETED", log
    assert 0 <= log.find("looked at by 2 processes on 2 nodes") < log.index("ZeRO-2 on 2 cpu processes, resuming")
    assert Checkpoint(latest(folder / "runs" / "digits" / "checkpoints")).images_seen == 480
    logs = (folder / "runs" / "digits" / "logs").iterdir()
    assert not [path for path in logs if path.suffix != ".log" and not path.name.startswith("attempt-")]


@pytest.mark.timeout(1200)
def test_preempted_twice_and_killed_once_on_each_node_it_ends_as_if_nothing_had_happened(cluster, folder, submit):
    """Evaluations and Weights & Biases too: nothing is left out to make it easy."""
    every = ["callbacks.checkpoint.every_n_images=160", "callbacks.evaluate.every_n_images=1600"]
    whole = [*WHOLE, "num_images=6400", *every]
    job, said = ended(cluster, folder, "alone", number_of(submit("name=alone", run=whole)[1]))
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), said
    number, hit = number_of(submit("name=hit", run=whole)[1]), folder / "runs" / "hit"
    log = lambda: (hit / "logs" / f"slurm-{number}.log").read_text(errors="replace")  # noqa: E731
    rivals = ["sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    faults = [
        lambda: cluster.run(*rivals), lambda: os.kill(rank_of(cluster, 0), signal.SIGKILL),
        lambda: cluster.run(*rivals), lambda: os.kill(rank_of(cluster, 1), signal.SIGKILL),
    ]  # fmt: skip
    for starts, fault in enumerate(faults, 1):
        begun = newest_row(hit) + 320
        until(lambda at=begun, n=starts: newest_row(hit) >= at and log().count("run hit in") == n, log, 240)
        fault()
        until(lambda n=starts: cluster.job(number)["Restarts"] == str(n), log, 120)
    job, said = ended(cluster, folder, "hit", number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "4"), said
    check_nothing_lost(hit, folder / "runs" / "alone")


def test_what_the_cluster_would_refuse_is_refused_with_what_it_has(submit, folder):
    code, output = submit("name=elsewhere", "partition=gpu")
    assert code == 2
    assert "invalid partition specified: gpu" in output
    assert "partitions here: main (up to infinite, 2 nodes), high (up to infinite, 2 nodes)" in output
    code, output = submit("name=elsewhere", "nodes=4")
    assert code == 2
    assert "node configuration is not available" in output.lower()
    code, output = submit("name=elsewhere", "dry_run=true")
    assert code == 0
    assert re.search(r"^Job \d+ to start at .* on nodes node\[1-2\] in partition main", output, re.MULTILINE)
    assert not (folder / "runs" / "elsewhere").exists()


def test_a_run_that_goes_back_to_an_earlier_checkpoint_is_queued_again_and_ends(cluster, folder, submit):
    """Samples 64 to 112 are bad: all ranks end with exit code 75, and the next start leaves them out."""
    spoiled = [
        "allowed_targets=[spies]", "+callbacks.poison._target_=spies.Poison", "+callbacks.poison.first=64",
        "+callbacks.poison.last=112", "callbacks.guard.skipped_in_a_row=2", "num_images=320",
    ]  # fmt: skip
    code, output = submit("name=back", *spoiled)
    assert code == 0, output
    job, log = ended(cluster, folder, "back", number_of(output))
    assert (job["JobState"], int(job["Restarts"]) >= 1) == ("COMPLETED", True), log
    assert "going back to" in log
    assert "back into the queue, to resume from checkpoint images-" in log
    assert Checkpoint(latest(folder / "runs" / "back" / "checkpoints")).images_seen == 320


def test_states_of_jobs_as_a_program_sees_them(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    slurm, script = Slurm(), tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --output=/dev/null\nsleep 300\n")
    number = slurm.submit(script)
    assert [job.number for job in slurm.live() if job.script == str(script)] == [number]
    cluster_jobs.until(lambda: slurm.state(number) == "RUNNING", lambda: slurm.state(number))
    cluster.run("scancel", number)
    cluster_jobs.until(lambda: slurm.state(number) == "CANCELLED", lambda: slurm.state(number))
    assert slurm.state("1") == "GONE"
