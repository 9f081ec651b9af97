"""diffusion-trainer doctor as the first step of a job: a process a node; nodes that are spoilt or slow are named."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import cluster_jobs
import pytest
from cluster_jobs import OVER, until
from conftest import ROOT, SMALL

from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = cluster_jobs.MARKS
RUN = ["experiment=digits", *SMALL, "strategy=zero2"]
SURE = ["doctor.slow=0.2", "doctor.slow_network=0.2"]  # of nodes that share cores
# $TMPDIR is none on the second node, and the third is slow.
JOB = """#!/bin/bash
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) OMP_NUM_THREADS=1
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
  [ "$SLURM_NODEID" != 1 ] || export TMPDIR=/no/such/folder
  program=.venv/bin/diffusion-trainer
  [ "$SLURM_NODEID" != 2 ] || program={slowed}
  exec .venv/bin/python "$program" doctor "$@"' doctor {arguments} doctor.processes="$SLURM_NTASKS"
"""


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory() as folder, cluster_jobs.local_cluster(Path(folder), nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def checkout(folder):
    return cluster_jobs.prepare(folder)


@pytest.fixture
def ended(cluster):
    """ended(job, log) -> what SLURM says of it once it is over, and the log's text."""

    def wait(job: str, path: Path) -> tuple[dict[str, str], str]:
        text = lambda: path.read_text() if path.is_file() else ""  # noqa: E731
        until(lambda: cluster.job(job)["JobState"] in OVER, text, 400)
        return cluster.job(job), text()

    return wait


def said(log: str, status: str) -> list[str]:
    """The findings with this status: check, text and nodes."""
    return re.findall(rf"^  {status} +(\S.*)$", log, re.MULTILINE)


def test_the_spoilt_node_and_the_slow_one_are_named(cluster, checkout, ended):
    arguments = " ".join([*RUN, *SURE, "batch_size=24", "lanes=6"])
    slowed = ROOT / "tests" / "slurm" / "slowed.py"
    (checkout / "job.sh").write_text(JOB.format(slowed=slowed, arguments=arguments))
    sbatch = ["sbatch", "--parsable", "--nodes=3", "--ntasks-per-node=2", "--output=log", "job.sh"]
    job, log = ended(cluster.run(*sbatch, cwd=checkout).strip(), checkout / "log")
    assert job["ExitCode"] == "1:0", log
    assert "looked at by 3 processes on 3 nodes" in log
    assert "24 = 6 processes x 1 micro-batch x 4, 6 lanes" in log
    assert "3 nodes agree to" in log
    (error,), warnings = said(log, "error"), said(log, "warning")
    assert re.match(r"\$TMPDIR +FileNotFoundError", error)
    assert error.endswith("[node2]")
    named = [(line.split()[0], line.split()[-1]) for line in warnings]
    assert named == [("matmul", "[node3]"), ("network", "[node3]")], log
    assert "rank 2 (cpu) is slow" in warnings[0]


@pytest.fixture
def by_hand(cluster, checkout) -> Callable[..., str]:
    """by_hand(*arguments) -> the number of a job of launch/train.sbatch with two tasks on each of two nodes."""

    def submit(*arguments: str, **env: str) -> str:
        paths = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'apps'}"
        sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", str(ROOT / "launch" / "train.sbatch")]
        return cluster.run(*sbatch, *arguments, cwd=checkout, PYTHONPATH=paths, WANDB_MODE="offline", **env).strip()

    return submit


def test_before_a_job_trains_one_process_looks_at_each_node_in_less_than_a_minute(checkout, by_hand, ended):
    number = by_hand(*RUN, "num_images=32", "name=looked", "callbacks.evaluate=null")
    job, log = ended(number, checkout / f"slurm-{number}.log")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), log
    (seconds,) = re.findall(r"looked at by 2 processes on 2 nodes in (\d+) s", log)
    assert int(seconds) < 60
    assert "16 = 4 processes x 1 micro-batch x 4" in log
    assert said(log, "error") == []
    assert log.index("looked at by") < log.index("ZeRO-2 on 4 cpu processes")
    assert Checkpoint(latest(checkout / "runs" / "looked" / "checkpoints")).images_seen == 32
    assert [path.name for path in checkout.glob(f"slurm-{number}*")] == [f"slurm-{number}.log"]


def test_a_mistake_that_the_doctor_finds_ends_the_job_with_exit_code_2(checkout, by_hand, ended):
    """16 images do not divide over three lanes."""
    number = by_hand(*RUN, "lanes=3", "name=mistake")
    job, log = ended(number, checkout / f"slurm-{number}.log")
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0"), log
    assert any(line.startswith("batch") for line in said(log, "error")), log
    assert "lanes=3 must divide batch_size=16" in log
    assert "run mistake in" not in log
