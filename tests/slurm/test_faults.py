"""More of what can happen to a job of launch/train.sbatch: time limits, saves against a grace time, a signal to one
rank at any moment, two jobs on a node, a port that is taken. On a SLURM that waits five seconds between TERM and KILL.
"""

import os
import signal
import socket
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cluster_jobs
import pytest
from cluster_jobs import begun, check_nothing_lost, left_of, log_of, rank_of, until
from conftest import SMALL

pytestmark = [*cluster_jobs.MARKS, pytest.mark.timeout(900)]
IMAGES, CHECKPOINT, EVALUATION, GRACE = 2560, 320, 1280, 5
LIMITS = 5
RUN = [
    "experiment=digits", *(a for a in SMALL if a != "logger=csv"), "strategy=zero2", "ema=several",
    f"num_images={IMAGES}", f"callbacks.checkpoint.every_n_images={CHECKPOINT}", "callbacks.evaluate.at_start=false",
    f"callbacks.evaluate.every_n_images={EVALUATION}", "evaluation.batch_size=5", "allowed_targets=[spies,faults]",
    "+callbacks.ledger._target_=spies.Ledger",
]  # fmt: skip


def callback(name: str, target: str, **arguments: object) -> list[str]:
    given = [f"+callbacks.{name}.{key}={value}" for key, value in arguments.items()]
    return [f"+callbacks.{name}._target_=faults.{target}", *given]


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

    def wait(job: str) -> tuple[dict[str, str], str]:
        state, log = cluster_jobs.ended(cluster, checkout, job, 600)
        until(lambda: not left_of(cluster, job), lambda: f"left of job {job}: {left_of(cluster, job)}", 30)
        return state, log

    return wait


def near_its_limit(cluster, checkout: Path, job: str, name: str, images: int) -> None:
    """Once the run has seen so many images its job has a minute left, or half of one more: SLURM, which looks every 30
    seconds, warns (--signal) when it looks next. Minutes are all that it knows, and some starts take one.
    """
    begun(cluster, checkout, job, name, images)
    minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":")[-2:])
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 1 + (seconds + 35) // 60}")


WARNED = ["--time=60", "--signal=TERM@65"]


@pytest.fixture(scope="module")
def beside():
    """A thread for what waits most of its time, while the others are tested."""
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(scope="module")
def limited(cluster, checkout, submit, beside) -> Future:
    """The number of a job that creeps until it has come near its time limit five times."""
    job = submit("limited", *callback("creep", "Creep", seconds=1, stops=LIMITS), options=WARNED)

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
    slow = [*callback("creep", "Creep", seconds=1, stops=1), *callback("slow", "SlowWhenStopped", seconds=200)]
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


@pytest.mark.parametrize(("seconds", "fits"), [(2, True), (20, False)])
def test_requeued_while_a_save_takes_so_long(cluster, checkout, submit, ended, alone, seconds, fits):
    """SLURM leaves it five seconds: a save that fits into them is kept, else the last periodic one stands."""
    name = f"save-{seconds}"
    number = submit(name, *callback("slow", "SlowWhenStopped", seconds=seconds))
    begun(cluster, checkout, number, name, 2 * CHECKPOINT + 64)
    cluster.run("scontrol", "requeue", number)
    job, log = ended(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert "writes slowly" in log  # it was hit in that save
    resumed = int(log.split("resuming from images-")[1].split()[0].rstrip(","))
    assert ("stopped at" in log) == fits, log
    if fits:
        assert f"stopped at {resumed:,} images" in log
    else:
        assert resumed % CHECKPOINT == 0
        assert resumed >= 2 * CHECKPOINT
    check_nothing_lost(checkout / "runs" / name, alone)


def hits(number: signal.Signals, first: int) -> list[str]:
    """At the second to fifth start of a job, the ranks in turns."""
    moments = [("InStep", {"images": 64}), ("InSave", {}), ("InEvaluation", {}), ("AtEnd", {})]
    return [
        argument
        for start, (target, more) in enumerate(moments, 1)
        for argument in callback(
            f"hit{start}", target, sends=number.name, rank=(first + start) % 2, start=start, **more
        )
    ]  # fmt: skip


def importing(cluster, rank: int, job: str) -> int:
    """This rank's process, once it is Python and before it can have anything to save."""
    found = []

    def there() -> bool:
        try:
            pid = rank_of(cluster, rank, job)
            found[:] = [pid] if b"diffusion_trainer" in Path(f"/proc/{pid}/cmdline").read_bytes() else []
        except (AssertionError, FileNotFoundError):
            return False
        return bool(found) and "python" in cluster_jobs.name_of(found[0])

    until(there, lambda: f"rank {rank} of job {job} never began", 60)
    return found[0]


def test_a_signal_to_one_rank_at_its_start_in_a_step_a_save_an_evaluation_and_at_the_end(
    cluster, checkout, submit, ended, alone
):
    """TERM and USR1 in a job each, side by side: one of them hits rank 0 where the other hits rank 1."""
    signals = {signal.SIGTERM: 0, signal.SIGUSR1: 1}
    jobs = {number: submit(f"one-{number.name}", *hits(number, first)) for number, first in signals.items()}
    for number, first in signals.items():
        os.kill(importing(cluster, first, jobs[number]), number)
    for number in signals:
        job, log = ended(jobs[number])
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "5"), log
        starts = log.split("back into the queue, to resume from checkpoint ")
        assert len(starts) == 6, log
        assert "stopped at" not in starts[0], log
        assert starts[1].startswith("none")
        for start, images in ((1, 80), (2, CHECKPOINT), (3, EVALUATION)):
            stopped = int(starts[start].split("stopped at ")[1].split()[0].replace(",", ""))
            assert images <= stopped <= images + (160 if start == 2 else 0), log  # a save does not hold up the steps
            assert starts[start + 1].startswith(f"images-{stopped:012d}"), log
        assert f"already at {IMAGES:,} images" in starts[5], log
        check_nothing_lost(checkout / "runs" / f"one-{number.name}", alone)


def test_five_time_limits_in_a_row(checkout, ended, limited, alone):
    """All by SLURM itself, with --signal before the limit."""
    job, log = ended(limited.result())
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(LIMITS)), log
    stopped = [int(part.split()[0].replace(",", "")) for part in log.split("stopped at ")[1:]]
    assert len(stopped) == LIMITS, log
    assert stopped == sorted(set(stopped)), log
    resumed = [f"images-{images:012d}" for images in stopped]
    assert [name for name in resumed if f"resuming from {name}" in log] == resumed, log
    check_nothing_lost(checkout / "runs" / "limited", alone)


def test_a_time_limit_that_comes_before_the_save_is_done(checkout, ended, overrun, alone):
    """SLURM kills the job, which is back in the queue then, and goes on from the last periodic checkpoint."""
    job, log = ended(overrun.result())
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert "writes slowly" in log.split("DUE TO TIME LIMIT")[0], log
    assert "time limit: back into the queue, to resume from checkpoint " in log
    assert "stopped at" not in log
    check_nothing_lost(checkout / "runs" / "overrun", alone)
