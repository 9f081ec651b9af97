"""launch/train.sbatch on a real SLURM of two nodes on this machine: a job survives what can happen to it."""

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import cluster_jobs
import pytest
from cluster_jobs import (  # fmt: skip
    WHOLE,
    begun,
    callback,
    left_of,
    log_of,
    newest_row,
    open_ports,
    rank_of,
    script,
    until,
    worker_of,
)
from undisturbed import check_nothing_lost

pytestmark = [*cluster_jobs.MARKS, pytest.mark.timeout(900)]
IMAGES, CHECKPOINT, BATCH = 3200, 160, 16
HANG_SECONDS = 15
RUN = [
    *WHOLE, f"num_images={IMAGES}", f"callbacks.checkpoint.every_n_images={CHECKPOINT}",
    f"callbacks.evaluate.every_n_images={IMAGES // 2}", f"callbacks.heartbeat.hang_timeout_seconds={HANG_SECONDS}",
]  # fmt: skip


def slowly(starts: int) -> list[str]:
    """So that so many starts do not come to the end of the run before something happens to them."""
    return callback("creep", "faults.Creep", seconds=0.1, starts=starts)


@pytest.fixture(scope="module")
def cluster():
    """It preempts a job with the signal that the job has asked for (--signal)."""
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster_jobs.local_cluster(Path(folder), SlurmctldParameters="preempt_send_user_signal") as cluster,
    ):
        yield cluster


@pytest.fixture(scope="module")
def checkout(folder):
    """Where jobs are submitted."""
    return cluster_jobs.prepare(folder)


@pytest.fixture(scope="module")
def submit(cluster, checkout):
    """submit(name, *arguments, options=sbatch's) -> the number of a job of two nodes with a task each."""
    return lambda name, *arguments, options=(): cluster_jobs.submit(
        cluster, checkout, *RUN, f"name={name}", *arguments, options=options
    )


def ended(cluster, checkout, job: str) -> tuple[dict[str, str], str]:
    return cluster_jobs.ended(cluster, checkout, job)


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
    assert cluster_jobs.curve(alone) == [*range(BATCH, IMAGES + 1, BATCH)]
    check_nothing_lost(alone, alone)
    assert not [path for path in checkout.glob("slurm-*") if path.suffix != ".log"]


@pytest.fixture
def survives(cluster, checkout, alone):
    """survives(job, name, what happens) -> how often it was restarted, and its log, once it has ended as if left alone.

    Each thing happens in another start, once that has seen a checkpoint's worth of images more than the one before; the
    job is back in the queue within so many seconds.
    """

    def survives(job: str, name: str, happen: Sequence[Callable[[], object]], seconds: float = 90) -> tuple[int, str]:
        run, log = checkout / "runs" / name, lambda: log_of(checkout, job)
        restarts = lambda: int(cluster.job(job)["Restarts"])  # noqa: E731
        for happens in happen:
            further, before = newest_row(run) + CHECKPOINT, restarts()
            until(lambda n=before: log().count(f"run {name} in") > n, log, 240)
            begun(cluster, checkout, job, name, further)
            until(lambda: open_ports(job, restarts() + 1) == [restarts()], log)  # where the ranks have met
            before = restarts()
            happens()
            until(lambda n=before: restarts() > n, log, seconds)
        state, _ = ended(cluster, checkout, job)
        assert state["JobState"] == "COMPLETED", log()
        check_nothing_lost(run, alone)
        return restarts(), log()

    return survives


def test_a_job_that_must_make_way_saves_comes_back_and_ends_as_if_nothing_had_happened(
    cluster, checkout, submit, survives
):
    """Put back by hand; preempted, by USR1, which it asks for; sent TERM as before a time limit; the file `stop`."""
    job = submit("way", *slowly(4), *callback("told", "faults.Told"), options=["--signal=USR1@60"])
    run, rival = checkout / "runs" / "way", ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    restarts, log = survives(job, "way", [
        lambda: cluster.run("scontrol", "requeue", job),
        lambda: cluster.run("sbatch", *rival, "--wrap=sleep 1"),
        lambda: cluster.run("scancel", "--signal=TERM", job),
        (run / "stop").touch,
    ])  # fmt: skip
    assert restarts == 4, log
    signals, stopped = zip(*((run / f"told-{start}-0").read_text().split() for start in range(4)), strict=True)
    assert signals == ("SIGTERM", "SIGUSR1", "SIGTERM", "SIGTERM")
    stopped = [int(images) for images in stopped]
    assert stopped == [int(images) for images in re.findall(r"resuming from images-(\d+)", log)], log  # no step is lost
    for start, (first, last) in enumerate(pairwise([0, *stopped, IMAGES]), 1):  # each start has a log of its own
        said = (run / "logs" / f"attempt-{start}" / "rank-0.log").read_text()
        steps = [int(images.replace(",", "")) for images in re.findall(r"(\S+) of \S+ images", said)]
        assert steps == [*range(first + BATCH, last + 1, BATCH)], said


def test_a_process_that_breaks_is_killed_or_hangs_ends_the_job_which_goes_on_from_its_checkpoint(
    cluster, checkout, submit, survives
):
    """An exception; SIGKILL and SIGSTOP of each rank and of a loader's worker. Ranks write where they were."""
    crash = callback("crash", "crashing.Crash", images=2 * CHECKPOINT, start=0)
    job, run = submit("hit", *slowly(7), *crash, "data.num_workers=1"), checkout / "runs" / "hit"

    def send(number: signal.Signals, find: Callable, rank: int) -> Callable[[], None]:
        return lambda: os.kill(find(cluster, rank, job), number)

    which = [(rank_of, 0), (rank_of, 1), (worker_of, 1)]
    sent = [send(number, *one) for number in (signal.SIGKILL, signal.SIGSTOP) for one in which]
    restarts, log = survives(job, "hit", [lambda: None, *sent], HANG_SECONDS + 60)
    assert restarts == log.count("back into the queue, to resume from checkpoint images-") == 7, log
    logs = [run / "logs" / f"attempt-{start + 1}" for start in range(8)]
    assert "RuntimeError: crash of the test" in (logs[0] / "rank-1.log").read_text()
    for start, rank in ((4, 1), (5, 0), (6, 0), (6, 1)):
        stacks = (logs[start] / f"stacks-rank-{rank}.txt").read_text()
        seconds = int(re.search(r"hung: no progress for (\d+) s", stacks)[1])
        assert HANG_SECONDS <= seconds < 2 * HANG_SECONDS, stacks
        assert "most recent call first" in stacks
    assert "T (stopped)" in stacks  # the worker
    for start, rank in enumerate((0, 1, 1, 0, 1, 1), 1):
        said = (logs[start] / "post-mortem.txt").read_text().splitlines()[0]
        assert re.search(rf": rank {rank} of 2 (hung|was not heard of|failed)", said), (start, said)


def test_a_job_that_has_lost_a_node_ends_on_the_other_waits_for_another_and_goes_on(
    cluster, checkout, submit, survives
):
    """The first node is where the job's script runs and ranks meet. Once it is back SLURM may TERM the next start."""
    job = submit("lost", *slowly(3))

    def lose(node: str, other: str) -> None:
        before = cluster.job(job)["Restarts"]
        cluster.crash(node)
        ranks = lambda: left_of(cluster, job, "SLURM_STEP_ID=0", node=other)  # noqa: E731
        until(lambda: not ranks(), lambda: f"ranks on {other}: {ranks()}\n{log_of(checkout, job)}", 30)
        until(lambda: cluster.job(job)["Restarts"] != before, lambda: log_of(checkout, job), 90)
        cluster.boot(node)

    restarts, log = survives(job, "lost", [lambda: lose("node1", "node2"), lambda: lose("node2", "node1")])
    assert 2 <= restarts <= 4, log
    assert "resuming from images-" in log  # the first may come before there is a checkpoint


def test_ranks_on_a_node_that_slurm_has_lost_save_and_stop_for_the_next_start(cluster, checkout, submit, survives):
    """The node's daemon alone dies. SLURM starts the job on the other node; the ranks of the first start go on."""
    job = submit(
        "unseen", *callback("creep", "faults.Creep", seconds=1, starts=1), options=["--nodes=1", "--ntasks-per-node=2"]
    )

    def lose() -> None:
        node = cluster.job(job)["NodeList"]
        cluster.lose(node)
        until(lambda: "told to stop" in log_of(checkout, job), lambda: log_of(checkout, job), 180)
        until(lambda: "resuming from" in log_of(checkout, job), lambda: log_of(checkout, job), 60)
        cluster.boot(node)

    restarts, log = survives(job, "unseen", [lose])
    assert restarts == 1, log
    assert "post-mortem" not in log


@pytest.mark.parametrize("mistake", ["optimizer.learning=1", "lanes=3"])
def test_a_mistake_in_the_arguments_is_told_once(cluster, checkout, submit, mistake):
    """The second is one that rank 0 alone looks for."""
    job, log = ended(cluster, checkout, submit("mistake", mistake))
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0"), log
    assert "error: " in log


def test_a_crash_loop_stops_and_says_how_to_go_on(cluster, checkout, submit):
    number = submit("loop", "logger=csv", *callback("crash", "crashing.Crash", images=16))
    job, log = ended(cluster, checkout, number)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "2"), log
    assert log.count("post-mortem of ") == 3
    assert "RuntimeError: crash of the test" in log
    assert "3 starts in a row without a newer checkpoint" in log
    assert f"log     {checkout}/slurm-{number}.log" in log
    assert "--nodes=2 --ntasks-per-node=1 launch/train.sbatch experiment=digits" in log
    assert not [path for path in checkout.glob(f"slurm-{number}*") if path.suffix != ".log"]


def test_a_cancelled_job_saves_and_stays_away(cluster, checkout, submit):
    number = submit("cancelled", *slowly(1))
    begun(cluster, checkout, number, "cancelled", CHECKPOINT)
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
