"""More of what can happen to a job of launch/train.sbatch: time limits, saves against a grace time, a signal to one
rank at any moment, two jobs on a node, a port that is taken. On a SLURM that waits five seconds between TERM and KILL.
"""

import os
import re
import signal
import socket
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cluster_jobs
import pytest
from cluster_jobs import WHOLE, begun, callback, importing, log_of, until
from undisturbed import check_nothing_lost

pytestmark = [*cluster_jobs.MARKS, pytest.mark.timeout(900)]
IMAGES, CHECKPOINT, EVALUATION, GRACE = 2560, 320, 1280, 5
LIMITS = 5
RUN = [
    *WHOLE, f"num_images={IMAGES}", f"callbacks.checkpoint.every_n_images={CHECKPOINT}",
    f"callbacks.evaluate.every_n_images={EVALUATION}", "evaluation.batch_size=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with (
        tempfile.TemporaryDirectory() as place,
        cluster_jobs.local_cluster(Path(place), KillWait=GRACE, MinJobAge=3600) as cluster,
    ):
        yield cluster


@pytest.fixture(scope="module")
def checkout(folder):
    return cluster_jobs.prepare(folder)


@pytest.fixture(scope="module")
def submit(cluster, checkout):
    """submit(name, *arguments, options=sbatch's) -> the number of a job."""
    return lambda name, *arguments, options=(): cluster_jobs.submit(
        cluster, checkout, *RUN, f"name={name}", *arguments, options=options
    )


@pytest.fixture(scope="module")
def ended(cluster, checkout):
    """ended(job) -> what SLURM says of it, and its log, once it is over and nothing that it started is left."""
    return lambda job: cluster_jobs.ended(cluster, checkout, job, 600)


def near_its_limit(cluster, checkout: Path, job: str, name: str, images: int) -> None:
    """Once the run has seen so many images its job has a minute left, or half of one more: SLURM, which looks every 30
    seconds, warns (--signal) when it looks next. Minutes are all that it knows, and some starts take one.
    """
    begun(cluster, checkout, job, name, images)
    minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":")[-2:])
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 1 + (seconds + 35) // 60}")


WARNED = ["--time=60", "--signal=TERM@65"]
TOLD = callback("told", "faults.Told")


def told(run: Path, start: int) -> int:
    """Images that had been seen in that start of its job when it saved to stop. What a rank prints at its end may be
    missing: srun ends it as soon as the other has ended.
    """
    return int((run / f"told-{start}-0").read_text().split()[1])


@pytest.fixture(scope="module")
def beside():
    """A thread for what waits most of its time, while the others are tested."""
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(scope="module")
def limited(cluster, checkout, submit, beside) -> Future:
    """The number of a job that creeps until it has come near its time limit five times."""
    job = submit("limited", *callback("creep", "faults.Creep", seconds=1, starts=LIMITS), *TOLD, options=WARNED)

    def limits() -> str:
        for start in range(1, LIMITS + 1):
            further = cluster_jobs.newest_row(checkout / "runs" / "limited") + 32
            near_its_limit(cluster, checkout, job, "limited", further)
            until(lambda n=start: cluster.job(job)["Restarts"] == str(n), lambda: log_of(checkout, job), 180)
            cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
        return job

    return beside.submit(limits)


@pytest.fixture(scope="module")
def overrun(cluster, checkout, submit, beside) -> Future:
    """The number of a job that is told to stop in time and cannot."""
    slow = [
        *callback("creep", "faults.Creep", seconds=1, starts=1),
        *callback("slow", "faults.SlowWhenStopped", seconds=200),
    ]
    job = submit("overrun", *slow, options=WARNED)

    def limit() -> str:
        near_its_limit(cluster, checkout, job, "overrun", 32)
        until(lambda: cluster.job(job)["Restarts"] == "1", lambda: log_of(checkout, job), 180)
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
        return job

    return beside.submit(limit)


@pytest.fixture(scope="module")
def alone(checkout, submit, ended) -> Path:
    """The folder of a run that nothing happens to."""
    job, log = ended(submit("alone"))
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), log
    return checkout / "runs" / "alone"


def held_back(cluster, submit, name: str, *arguments: str) -> tuple[str, int]:
    """A job that waits to be released, and the port at which its ranks are to meet in their first start."""
    job = submit(name, *arguments, options=["--hold"])
    return job, 20000 + int(job) % 12000


@pytest.mark.usefixtures("limited", "overrun")  # which have begun then
def test_a_port_that_is_taken_costs_a_start_and_no_more(cluster, checkout, submit, ended, alone):
    """Somebody listens there, and answers nothing: a rank that connects to him would wait for long."""
    job, port = held_back(cluster, submit, "port")
    with socket.create_server(("", port)):
        cluster.run("scontrol", "release", job)
        until(lambda: cluster.job(job)["Restarts"] == "1", lambda: log_of(checkout, job))
    job, log = ended(job)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    first, _, second = log.partition("back into the queue, to resume from checkpoint none")
    assert f"port: {port}" in first, log
    assert "address already in use" in first.lower(), log
    assert "done: port" in second, log
    check_nothing_lost(checkout / "runs" / "port", alone)


def test_two_jobs_on_one_node_at_the_same_time(cluster, checkout, submit, ended, alone):
    on_one = ["--nodes=1", "--ntasks-per-node=2", "--nodelist=node2"]
    jobs = {name: submit(name, options=on_one) for name in ("left", "right")}
    over = {name: ended(job) for name, job in jobs.items()}
    for name, (job, log) in over.items():
        assert (job["JobState"], job["Restarts"], job["NodeList"]) == ("COMPLETED", "0", "node2"), log
        check_nothing_lost(checkout / "runs" / name, alone)
    assert max(j["StartTime"] for j, _ in over.values()) < min(j["EndTime"] for j, _ in over.values())


def test_a_rank_that_hangs_before_its_first_batch_and_its_peer_that_srun_ends_leave_their_stacks(
    checkout, submit, ended, alone
):
    """The peer is in its first step, which it has much longer for."""
    job, log = ended(submit("stuck", *callback("stuck", "spies.Stuck"), "callbacks.heartbeat.hang_timeout_seconds=15"))
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert "rank 1 of 2 hung" in log
    last_words = ("no sign of life in the ", "hung: no progress for 1")
    for rank, words in enumerate(last_words):
        stacks = (checkout / "runs" / "stuck" / "logs" / "attempt-1" / f"stacks-rank-{rank}.txt").read_text()
        assert words in stacks
        assert "most recent call first" in stacks
    check_nothing_lost(checkout / "runs" / "stuck", alone)


@pytest.mark.parametrize(("seconds", "fits"), [(2, True), (20, False)])
def test_requeued_while_a_save_takes_so_long(cluster, checkout, submit, ended, alone, seconds, fits):
    """SLURM leaves it five seconds: a save that fits into them is kept, else the last periodic one stands."""
    name = f"save-{seconds}"
    number = submit(name, *callback("slow", "faults.SlowWhenStopped", seconds=seconds), *TOLD)
    begun(cluster, checkout, number, name, 2 * CHECKPOINT + 64)
    cluster.run("scontrol", "requeue", number)
    job, log = ended(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert "writes slowly" in log  # it was hit in that save
    resumed = int(log.split("resuming from images-")[1].split()[0].rstrip(","))
    assert (resumed == told(checkout / "runs" / name, 0)) == fits, log
    if not fits:
        assert resumed % CHECKPOINT == 0
        assert resumed >= 2 * CHECKPOINT
    check_nothing_lost(checkout / "runs" / name, alone)


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
MOMENTS = [("InStart", {}), ("InStep", {"images": 64}), ("InSave", {}), ("InEvaluation", {}), ("AtEnd", {})]


def due(which: int, start: int) -> tuple[signal.Signals, int]:
    """What is sent in that start of the first or the second job, and to which rank: to the other one in the other."""
    return SIGNALS[(which + start) % 3], (which + start) % 2


def hits(which: int) -> list[str]:
    found = []
    for start, (target, more) in enumerate(MOMENTS, 1):
        number, rank = due(which, start)
        found += callback(f"hit{start}", f"faults.{target}", sends=number.name, rank=rank, start=start, **more)
    return found


def test_a_signal_to_one_rank_at_its_start_in_a_step_a_save_an_evaluation_and_at_the_end(
    cluster, checkout, submit, ended, alone
):
    """Two jobs side by side, with TERM, USR1 and USR2 in turns, so that each moment sees two of them and both ranks."""
    jobs = [submit(f"one-{which}", *hits(which)) for which in range(2)]
    for which, job in enumerate(jobs):
        number, rank = due(which, 0)
        os.kill(importing(cluster, rank, job), number)
    for which, job in enumerate(jobs):
        state, log = ended(job)
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "5"), log
        starts = log.split("back into the queue, to resume from checkpoint ")
        assert len(starts) == 6, log
        for start in (0, 1):  # before there is anything to save
            assert "stopped at" not in starts[start], log
            assert starts[start + 1].startswith("none"), log
        for start, images in ((2, 80), (3, CHECKPOINT), (4, EVALUATION)):
            saved = int(starts[start + 1].removeprefix("images-").split()[0])
            assert images <= saved <= images + (160 if start == 3 else 0), log  # a save does not hold up the steps
        assert f"done: one-{which}" in starts[5], log  # it came when there was nothing to stop any more
        check_nothing_lost(checkout / "runs" / f"one-{which}", alone)


def test_five_time_limits_in_a_row(checkout, ended, limited, alone):
    """All by SLURM itself, with --signal before the limit."""
    job, log = ended(limited.result())
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(LIMITS)), log
    stopped = [told(checkout / "runs" / "limited", start) for start in range(LIMITS)]
    assert stopped == sorted(set(stopped)), log
    assert stopped == [int(images) for images in re.findall(r"resuming from images-(\d+)", log)], log
    check_nothing_lost(checkout / "runs" / "limited", alone)


def test_a_time_limit_that_comes_before_the_save_is_done(checkout, ended, overrun, alone):
    """SLURM kills the job, which is back in the queue then, and goes on from the last periodic checkpoint."""
    job, log = ended(overrun.result())
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert "writes slowly" in log.split("DUE TO TIME LIMIT")[0], log
    assert "time limit: back into the queue, to resume from checkpoint " in log
    assert "stopped at" not in log
    check_nothing_lost(checkout / "runs" / "overrun", alone)
