"""launch/train.sbatch on a real SLURM of two nodes on this machine: a job survives what can happen to it."""

import csv
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

from diffusion_trainer.training.checkpoints import Checkpoint, latest

SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
INSTALLED = all(shutil.which(name, path=SBIN) for name in ("slurmctld", "slurmd", "munged"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(not INSTALLED, reason="SLURM is not installed: apt-get install slurm-wlm munge"),
]
IMAGES = 3200
RUN = [
    "experiment=digits", *SMALL, "strategy=zero2", f"num_images={IMAGES}", "callbacks.evaluate=null",
    "callbacks.checkpoint.every_n_images=320", "allowed_targets=[crashing]",
]  # fmt: skip
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")


def script():
    """launch/local_cluster.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("local_cluster", ROOT / "launch" / "local_cluster.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with more cores than there are, so that nothing waits for them."""
    with tempfile.TemporaryDirectory() as folder, script().LocalCluster(Path(folder), nodes=2, cpus=4) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def checkout(folder):
    """Where jobs are submitted: with shards, and the .venv that runs this test."""
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.fixture(scope="module")
def submit(cluster, checkout):
    """submit(name, *arguments) -> the number of a job of two nodes with a task each."""

    def submit(name: str, *arguments: str) -> str:
        sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", str(ROOT / "launch" / "train.sbatch")]
        paths = f"{ROOT / 'tests'}:{ROOT / 'tests' / 'slurm'}"
        return cluster.run(*sbatch, *RUN, f"name={name}", *arguments, cwd=checkout, PYTHONPATH=paths).strip()

    return submit


def ended(cluster, checkout, job: str, seconds: float = 300) -> tuple[dict[str, str], str]:
    """What SLURM says of a job that has ended for good, and its log."""
    until(lambda: cluster.job(job)["JobState"] in OVER, f"job {job} did not end", seconds)
    return cluster.job(job), log_of(checkout, job)


def log_of(checkout, job: str) -> str:
    path = checkout / f"slurm-{job}.log"
    return path.read_text(errors="replace") if path.is_file() else ""


def until(condition, complaint: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.1)


def begun(cluster, checkout, job: str, name: str, images: int = 320) -> None:
    """Returns when the run has logged so many images, which its job has not ended by then."""
    path = checkout / "runs" / name / "metrics.csv"

    def logged() -> bool:
        assert cluster.job(job)["JobState"] not in OVER, log_of(checkout, job)
        return path.is_file() and f"\n{images}," in path.read_text()

    until(logged, f"{path} never came to {images} images")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) if pid else 0


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


def rank_of(cluster, rank: int) -> int:
    """The process of this rank that trains: its grandparent is SLURM's, its parent the shell that watches it."""
    for pid in cluster.processes():
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        above = parent(parent(pid))
        if f"SLURM_PROCID={rank}".encode() in entries and above and "slurmstepd" in name_of(above):
            return pid
    raise AssertionError(f"there is no rank {rank}")


def state(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights, averages and moments at the end."""
    checkpoint = Checkpoint(latest(run / "checkpoints"))
    assert checkpoint.images_seen == IMAGES
    return {kind: checkpoint.whole(kind) for kind in sorted(checkpoint.kinds)}


def same_as_undisturbed(run: Path, alone: Path) -> None:
    """All numbers bitwise, and one curve with each step once."""
    ours, theirs = state(run), state(alone)
    assert ours.keys() == theirs.keys()
    for kind, tensors in theirs.items():
        for name, tensor in tensors.items():
            assert torch.equal(ours[kind][name], tensor), (kind, name)
    with (run / "metrics.csv").open(newline="") as file:
        assert [int(row["images_seen"]) for row in csv.DictReader(file)] == list(range(16, IMAGES + 1, 16))


@pytest.fixture(scope="module")
def undisturbed(cluster, checkout, submit):
    """What SLURM says of a job that nothing happens to, and its log."""
    return ended(cluster, checkout, submit("alone"))


@pytest.fixture(scope="module")
def alone(checkout, undisturbed) -> Path:
    """The folder of its run."""
    return checkout / "runs" / "alone"


def test_two_nodes_train_to_the_end(checkout, undisturbed, alone):
    job, log = undisturbed
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), log
    assert "ZeRO-2 on 2 cpu processes" in log
    assert "done: alone" in log
    same_as_undisturbed(alone, alone)
    assert not [path for path in checkout.glob("slurm-*") if path.suffix != ".log"]


def requeued_by_hand(cluster, job: str) -> None:
    cluster.run("scontrol", "requeue", job)


def preempted(cluster, job: str) -> None:
    cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def told_to_stop(cluster, job: str) -> None:
    """What --signal does before the time limit."""
    cluster.run("scancel", "--signal=TERM", job)


@pytest.mark.parametrize("happens", [requeued_by_hand, preempted, told_to_stop], ids=lambda f: f.__name__)
def test_a_job_that_must_make_way_saves_comes_back_and_ends_as_if_nothing_had_happened(
    cluster, checkout, submit, alone, happens
):
    name = happens.__name__
    number = submit(name)
    begun(cluster, checkout, number, name)
    happens(cluster, number)
    job, log = ended(cluster, checkout, number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    stopped = int(log.split("stopped at ")[1].split()[0].replace(",", ""))
    assert 320 <= stopped < IMAGES
    assert f"resuming from images-{stopped:012d}" in log  # not a step lost
    same_as_undisturbed(checkout / "runs" / name, alone)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_within_seconds_and_it_goes_on_from_its_checkpoint(
    cluster, checkout, submit, alone, rank
):
    name = f"killed-{rank}"
    number = submit(name)
    begun(cluster, checkout, number, name, 640)
    os.kill(rank_of(cluster, rank), signal.SIGKILL)
    until(lambda: cluster.job(number)["Restarts"] == "1", log_of(checkout, number), 45)
    job, log = ended(cluster, checkout, number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert "back into the queue, to resume from checkpoint images-" in log
    assert "resuming from images-" in log
    same_as_undisturbed(checkout / "runs" / name, alone)


@pytest.mark.parametrize("mistake", ["optimizer.learning=1", "lanes=3"])
def test_a_mistake_in_the_arguments_is_told_once(cluster, checkout, submit, mistake):
    """The second is one that rank 0 alone looks for."""
    job, log = ended(cluster, checkout, submit("mistake", mistake))
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0"), log
    assert "error: " in log


def test_a_crash_loop_stops_and_says_how_to_go_on(cluster, checkout, submit):
    crash = ["+callbacks.crash._target_=crashing.Crash", "+callbacks.crash.images=16"]
    number = submit("loop", *crash)
    job, log = ended(cluster, checkout, number)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "2"), log
    assert log.count("RuntimeError: crash of the test") == 3
    assert "3 starts in a row without a newer checkpoint" in log
    assert f"log     {checkout}/slurm-{number}.log" in log
    assert "sbatch --nodes=2 --ntasks-per-node=1 launch/train.sbatch experiment=digits" in log
    assert not [path for path in checkout.glob(f"slurm-{number}*") if path.suffix != ".log"]


def test_a_cancelled_job_saves_and_stays_away(cluster, checkout, submit):
    number = submit("cancelled")
    begun(cluster, checkout, number, "cancelled")
    cluster.run("scancel", number)
    job, _ = ended(cluster, checkout, number)
    until(lambda: "stopped at " in log_of(checkout, number), log_of(checkout, number))
    time.sleep(1)
    assert (job["JobState"], cluster.job(number)["Restarts"]) == ("CANCELLED", "0")


def test_nothing_is_left_of_a_cluster(tmp_path_factory):
    """Not even of a job that ignores SIGTERM; and a second one in the same folder is refused while it is up."""
    with tempfile.TemporaryDirectory() as folder:
        cluster, other = (script().LocalCluster(Path(folder), nodes=1) for _ in range(2))
        with cluster:
            stubborn = "trap '' TERM; echo here; while :; do sleep 1; done"
            cluster.run("sbatch", f"--output={folder}/log", f'--wrap=srun bash -c "{stubborn}"')
            until(lambda: Path(folder, "log").is_file() and "here" in Path(folder, "log").read_text(), "never started")
            assert len(cluster.processes()) > 5
            with pytest.raises(Exception, match=r"is up in .* already"):
                other.up()
        found = subprocess.run(["grep", "-la", f"SLURM_CONF={folder}", *map(str, Path("/proc").glob("[0-9]*/environ"))],
                               capture_output=True, text=True)  # fmt: skip
        assert found.stdout == ""
