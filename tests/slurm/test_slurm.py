"""launch/train.sbatch on a real SLURM of two nodes on this machine: a job survives what can happen to it."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import cluster_jobs
import pytest
import torch
from cluster_jobs import begun, curve, log_of, rank_of, script, until, worker_of
from conftest import SMALL

from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = cluster_jobs.MARKS
IMAGES = 3200
RUN = [
    "experiment=digits", *SMALL, "strategy=zero2", f"num_images={IMAGES}", "callbacks.evaluate=null",
    "callbacks.checkpoint.every_n_images=320", "allowed_targets=[crashing]",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory() as folder, cluster_jobs.local_cluster(Path(folder)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def checkout(folder):
    """Where jobs are submitted."""
    return cluster_jobs.prepare(folder)


@pytest.fixture(scope="module")
def submit(cluster, checkout):
    """submit(name, *arguments) -> the number of a job of two nodes with a task each."""
    return lambda name, *arguments: cluster_jobs.submit(cluster, checkout, *RUN, f"name={name}", *arguments)


def ended(cluster, checkout, job: str) -> tuple[dict[str, str], str]:
    return cluster_jobs.ended(cluster, checkout, job)


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
    assert curve(run) == list(range(16, IMAGES + 1, 16))


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


def killed_rank_0(cluster) -> None:
    os.kill(rank_of(cluster, 0), signal.SIGKILL)


def killed_rank_1(cluster) -> None:
    os.kill(rank_of(cluster, 1), signal.SIGKILL)


def killed_worker(cluster) -> None:
    os.kill(worker_of(cluster, 1), signal.SIGKILL)


@pytest.mark.parametrize("happens", [killed_rank_0, killed_rank_1, killed_worker], ids=lambda f: f.__name__)
def test_a_killed_process_ends_the_job_within_seconds_and_it_goes_on_from_its_checkpoint(
    cluster, checkout, submit, alone, happens
):
    name = happens.__name__
    number = submit(name, "data.num_workers=1")
    begun(cluster, checkout, number, name, 640)
    happens(cluster)
    until(lambda: cluster.job(number)["Restarts"] == "1", lambda: log_of(checkout, number), 45)
    job, log = ended(cluster, checkout, number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert "back into the queue, to resume from checkpoint images-" in log
    assert "resuming from images-" in log
    same_as_undisturbed(checkout / "runs" / name, alone)


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_job_that_has_lost_a_node_waits_for_another_and_goes_on(cluster, checkout, submit, alone, node):
    """The first node is where the job's script runs and ranks meet."""
    name = f"lost-{node}"
    number = submit(name)
    begun(cluster, checkout, number, name, 640)
    cluster.crash(node)
    until(lambda: cluster.job(number)["Restarts"] == "1", lambda: log_of(checkout, number), 90)
    cluster.boot(node)
    job, log = ended(cluster, checkout, number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
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
    assert log.count("post-mortem of ") == 3
    assert "RuntimeError: crash of the test" in log
    assert "3 starts in a row without a newer checkpoint" in log
    assert f"log     {checkout}/slurm-{number}.log" in log
    assert "--nodes=2 --ntasks-per-node=1 launch/train.sbatch experiment=digits" in log
    assert not [path for path in checkout.glob(f"slurm-{number}*") if path.suffix != ".log"]


def test_a_cancelled_job_saves_and_stays_away(cluster, checkout, submit):
    number = submit("cancelled")
    begun(cluster, checkout, number, "cancelled")
    cluster.run("scancel", number)
    job, _ = ended(cluster, checkout, number)
    until(lambda: "stopped at " in log_of(checkout, number), lambda: log_of(checkout, number))
    time.sleep(1)  # in which it would come back
    assert (job["JobState"], cluster.job(number)["Restarts"]) == ("CANCELLED", "0")


def test_nothing_is_left_of_a_cluster(tmp_path_factory):
    """Not even of a job that ignores SIGTERM; and a second one in the same folder is refused while it is up."""
    with tempfile.TemporaryDirectory() as folder:
        cluster, other = (script().LocalCluster(Path(folder), nodes=1) for _ in range(2))
        with cluster:
            stubborn = "trap '' TERM; echo here; while :; do sleep 1; done"
            cluster.run("sbatch", f"--output={folder}/log", f'--wrap=srun bash -c "{stubborn}"')
            until(lambda: Path(folder, "log").is_file() and "here" in Path(folder, "log").read_text(), str)
            assert len(cluster.processes()) > 5
            with pytest.raises(Exception, match=r"is up in .* already"):
                other.up()
        found = subprocess.run(["grep", "-la", f"SLURM_CONF={folder}", *map(str, Path("/proc").glob("[0-9]*/environ"))],
                               capture_output=True, text=True)  # fmt: skip
        assert found.stdout == ""
