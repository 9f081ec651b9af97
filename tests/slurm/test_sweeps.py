"""Sweeps whose points are jobs, on a real SLURM of two nodes on this machine."""

import csv
import json
import os
import re
import signal
import tempfile
from pathlib import Path

import cluster_jobs
import pytest
from conftest import ROOT, SMALL, command, finish

from diffusion_trainer.callbacks.wandb_files import identity

pytestmark = cluster_jobs.MARKS
SWEEP = [
    "train", "-m", "experiment=digits", *SMALL, "strategy=zero2", "num_images=64", "callbacks.evaluate.at_start=false",
    "hydra/launcher=slurm", "runner.poll_seconds=0.5", "nodes=2", "tasks_per_node=1", "time=01:00:00",
    "doctor=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory() as place, cluster_jobs.local_cluster(Path(place)) as cluster:
        yield cluster


@pytest.fixture
def sweep(cluster, folder):
    """sweep(*arguments) -> the process of a sweep of jobs, from the folder of the module's runs."""
    paths = f"{ROOT / 'tests'}:{ROOT / 'tests' / 'slurm'}"
    env = {"SLURM_CONF": str(cluster.conf), "PYTHONPATH": paths}
    return lambda *arguments: command(*SWEEP, *arguments, cwd=folder, **env)


def entries(folder: Path, name: str) -> list[dict]:
    path = folder / "runs" / name / "sweep.json"
    return json.loads(path.read_text())["points"] if path.is_file() else []


def queued(folder: Path, name: str, count: int) -> list[str]:
    """The numbers of a sweep's jobs, once there are so many."""
    jobs = lambda: [entry["job"] for entry in entries(folder, name) if entry["job"]]  # noqa: E731
    cluster_jobs.until(lambda: len(jobs()) == count, lambda: str(entries(folder, name)), 300)
    return jobs()


def rows(folder: Path, name: str) -> list[dict]:
    with (folder / "runs" / name / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.timeout(1800)
def test_four_points_on_two_nodes_are_scored_though_their_sweep_is_killed(folder, sweep):
    """The sweep is killed while its jobs wait or run, and started again: it goes on watching the same ones."""
    arguments = ["name=four", "optimizer.lr=1e-3,2e-3", "guidance.scale=1,2"]
    first = sweep(*arguments)
    jobs = queued(folder, "four", 4)
    os.kill(first.pid, signal.SIGKILL)
    finish(first)
    code, output = finish(sweep(*arguments))
    assert code == 0, output
    assert "4 of 4 points are done" in output
    assert [entry["job"] for entry in entries(folder, "four")] == jobs  # none was queued twice
    found = rows(folder, "four")
    swept = [(row["optimizer.lr"], row["guidance.scale"]) for row in found]
    assert swept == [("0.001", "1"), ("0.001", "2"), ("0.002", "1"), ("0.002", "2")]
    assert all(row["state"] == "done" and float(row["fid"]) > 0 for row in found)
    for job, row in zip(jobs, found, strict=True):
        place = folder / "runs" / "four" / f"optimizer.lr-{row['optimizer.lr']}+guidance.scale-{row['guidance.scale']}"
        assert "ZeRO-2 on 2 cpu processes" in (place / "logs" / f"slurm-{job}.log").read_text()
        assert float(row["fid"]) == json.loads((place / "metrics.json").read_text())["metrics"]["fid"]
    code, output = finish(sweep(*arguments))
    assert code == 0
    assert output.count("is done already") == 4


@pytest.mark.timeout(1800)
def test_ctrl_c_leaves_the_jobs_and_a_point_that_fails_stops_no_other(cluster, folder, sweep):
    crash = ["+callbacks.crash._target_=crashing.Crash", "allowed_targets=[crashing]", "max_starts=1"]
    arguments = ["name=crash", *crash, "+callbacks.crash.images=16,100000"]
    first = sweep(*arguments)
    jobs = queued(folder, "crash", 2)
    first.send_signal(signal.SIGINT)
    code, output = finish(first)
    assert code == 130, output
    assert f"goes on as job {jobs[1]}" in output
    assert "the same command goes on watching them" in output
    assert cluster.job(jobs[1])["JobState"] in ("PENDING", "RUNNING", "CONFIGURING")
    code, output = finish(sweep(*arguments))
    assert code not in (0, 2), output
    assert "1 of 2 points are done" in output
    assert re.search(r"\[1/2\] \+?callbacks.crash.images=16 failed with exit code", output)
    assert [row["state"] for row in rows(folder, "crash")] == ["failed", "done"]
    assert entries(folder, "crash")[1]["job"] == jobs[1]


@pytest.mark.timeout(1800)
def test_a_search_of_jobs_cancels_what_is_worse_and_all_are_one_group(cluster, folder, sweep):
    """Guided by 100 all pixels are black or white. Steps are so slow that a job lasts for many looks of the sweep."""
    arguments = ["name=search", "sweeper=tpe", "sweeper.seed=14", "trials=3", "guidance.scale=1,2,100", "parallel=1"]
    often = ["num_images=1600", "callbacks.evaluate.every_n_images=160", "prune=true", "sweeper.prune_startup_trials=1"]
    creep = ["+callbacks.creep._target_=faults.Creep", "+callbacks.creep.seconds=0.05", "+callbacks.creep.starts=1"]
    code, output = finish(sweep(*arguments, *often, *creep, "allowed_targets=[faults]", "logger=default"))
    assert code == 0, output
    found = rows(folder, "search")
    states = {row["guidance.scale"]: row["state"] for row in found}
    assert (states["2"], states["100"], len(states)) == ("done", "pruned", 3)  # 1 comes last, and may be a little worse
    ends = {"done": "COMPLETED", "pruned": "CANCELLED"}
    for entry in entries(folder, "search"):
        assert cluster.job(entry["job"])["JobState"] == ends[entry["state"]]
    runs = {path.parents[2] for path in (folder / "runs" / "search").glob("**/offline-run-*/run-*.wandb")}
    assert runs
    assert {identity(run)["group"] for run in runs} == {"search"}


def test_what_slurm_refuses_is_said_before_anything_is_queued(cluster, folder, sweep):
    code, output = finish(sweep("name=refused", "seed=0,1", "partition=nowhere"))
    assert code == 2, output
    assert "nothing was started" in output
    assert "every point:" in output
    assert "partitions here: " in output
    assert not cluster.run("squeue", "--noheader").strip()
    assert not (folder / "runs" / "refused" / "sweep.json").exists()
