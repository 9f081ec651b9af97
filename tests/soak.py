"""One run on a real SLURM of two nodes that is hit by fault after fault, against one that was left alone.

    python tests/soak.py [--faults 50] [--seed 0] [--shards shards/digits] [--folder F]

Each fault comes at a random moment, once the run has got further than it was at the last. Prints a table in Markdown
and "N of N survived, L lost": faults after which the run went on with nobody's help, and samples that are missing or
other ones than in the run that was left alone.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import cluster_jobs
import torch
from cluster_jobs import begun, ended, importing, local_cluster, log_of, newest_row, rank_of, submit, until, worker_of
from ledgers import lines
from undisturbed import check_one_curve

from diffusion_trainer.training.checkpoints import Checkpoint, latest

BATCH, STEPS_PER_FAULT = 16, 50  # fifty faults took 864 steps
FURTHER = 24  # steps, at most, that a run goes after it has come back before it is hit again
PATIENCE_SECONDS = 600  # a lost node costs two starts, and a busy machine minutes for each
START_SECONDS = 8  # that a start is given before it is killed: imports, the ranks' meeting, what it goes on from
RUN = [
    *cluster_jobs.WHOLE, "data.num_workers=1", f"callbacks.checkpoint.every_n_images={8 * BATCH}",
    f"callbacks.evaluate.every_n_images={32 * BATCH}", "callbacks.heartbeat.hang_timeout_seconds=15",
]  # fmt: skip


@dataclass
class Job:
    """The run that is hit."""

    cluster: object
    checkout: Path
    number: str
    choose: random.Random

    @property
    def run(self) -> Path:
        return self.checkout / "runs" / "soaked"

    def rank(self) -> int:
        return self.choose.randrange(2)

    def node(self) -> str:
        return self.choose.choice(self.cluster.nodes)


def killed_rank(job: Job) -> None:
    os.kill(rank_of(job.cluster, job.rank()), signal.SIGKILL)


def killed_in_a_save(job: Job) -> None:
    pid, end = rank_of(job.cluster, job.rank()), time.monotonic() + 60
    while not [*(job.run / "checkpoints").glob(".images-*.part")]:  # some milliseconds, each eight steps
        assert time.monotonic() < end, "it never saved"
    os.kill(pid, signal.SIGKILL)


def killed_in_its_start(job: Job) -> None:
    """The start that comes after a stop in order."""
    rank = job.rank()
    before = rank_of(job.cluster, rank)
    told_to_stop(job)
    pid = importing(job.cluster, rank, job.number, before)
    time.sleep(job.choose.uniform(0, START_SECONDS))
    os.kill(pid, signal.SIGKILL)


def stopped_rank(job: Job) -> None:
    os.kill(rank_of(job.cluster, job.rank()), signal.SIGSTOP)


def killed_worker(job: Job) -> None:
    os.kill(worker_of(job.cluster, job.rank()), signal.SIGKILL)


def stopped_worker(job: Job) -> None:
    os.kill(worker_of(job.cluster, job.rank()), signal.SIGSTOP)


def one_rank_told_to_stop(job: Job) -> None:
    number = job.choose.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
    os.kill(rank_of(job.cluster, job.rank()), number)


def told_to_stop(job: Job) -> None:
    job.cluster.run("scancel", "--signal=TERM", job.number)


def requeued(job: Job) -> None:
    job.cluster.run("scontrol", "requeue", job.number)


def preempted(job: Job) -> None:
    job.cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def lost_node(job: Job) -> None:
    """It is back after the job was put into the queue again."""
    node, starts = job.node(), job.cluster.job(job.number)["Restarts"]
    job.cluster.crash(node)
    until(lambda: job.cluster.job(job.number)["Restarts"] != starts, lambda: "not requeued", PATIENCE_SECONDS)
    job.cluster.boot(node)


FAULTS = (
    killed_rank, killed_in_a_save, killed_in_its_start, stopped_rank, killed_worker, stopped_worker,
    one_rank_told_to_stop, told_to_stop, requeued, preempted, lost_node,
)  # fmt: skip


@dataclass
class Report:
    rows: list[tuple] = field(default_factory=list)
    survived: int = 0
    lost: int = 0  # samples
    same_curve: bool = False
    different: list[str] = field(default_factory=list)  # tensors

    def text(self) -> str:
        head = ["| fault | at images | seconds until it trained on |", "|---|---|---|"]
        table = [*head, *("| " + " | ".join(map(str, row)) + " |" for row in self.rows)]
        same = "bitwise those" if not self.different else f"not those ({', '.join(self.different[:5])})"
        end = f"Weights, averages and moments are {same} of the run that was left alone"
        rows = "each step is logged once, in metrics.csv and W&B" if self.same_curve else "its curve is another"
        return "\n".join(
            [*table, "", f"{self.survived} of {len(self.rows)} survived, {self.lost} lost. {end}; {rows}."]
        )

    @property
    def good(self) -> bool:
        return self.survived == len(self.rows) and not self.lost and not self.different and self.same_curve


def soak(folder: Path, cluster, *, faults: int, seed: int, kinds: Sequence[Callable] = FAULTS) -> Report:
    """Both runs, in folder/runs; shards of the digits must be there."""
    choose, report = random.Random(seed), Report()
    alone = folder / "runs" / "alone"
    every = [choose.sample(kinds, len(kinds)) for _ in range(-(-faults // len(kinds)))]  # each as often as the others
    whole = [*RUN, f"num_images={faults * STEPS_PER_FAULT * BATCH}"]
    state, log = ended(cluster, folder, submit(cluster, folder, *whole, "name=alone"), PATIENCE_SECONDS + faults * 60)
    assert state["JobState"] == "COMPLETED", log
    job = Job(cluster, folder, submit(cluster, folder, *whole, "name=soaked"), choose)
    begun(cluster, folder, job.number, "soaked", BATCH)
    for fault in [f for turn in every for f in turn][:faults]:
        at = newest_row(job.run) + choose.randrange(1, FURTHER) * BATCH
        begun(cluster, folder, job.number, "soaked", at)
        time.sleep(choose.uniform(0, 0.3))
        report.rows.append((fault.__name__.replace("_", " "), *_hit(job, fault)))
        print(*report.rows[-1], sep=", ", file=sys.stderr)
        report.survived += report.rows[-1][-1] != "never"
        if report.rows[-1][-1] == "never":
            print(log_of(folder, job.number)[-4000:], file=sys.stderr)
            break
    state, log = ended(cluster, folder, job.number, PATIENCE_SECONDS + faults * 60)
    assert state["JobState"] == "COMPLETED", log
    _compare(report, alone, job.run)
    return report


def _hit(job: Job, fault: Callable[[Job], None]) -> tuple[int, str]:
    """Where the run was, and how long it took until it had got further in another start."""
    at, begin = newest_row(job.run), time.monotonic()
    fault(job)
    reached, starts = newest_row(job.run), _starts(job)

    def further() -> bool:
        return _state(job) in cluster_jobs.OVER or (_starts(job) > starts and newest_row(job.run) > reached)

    try:
        until(further, lambda: "it did not come back", PATIENCE_SECONDS)
    except AssertionError:
        return at, "never"
    return at, f"{time.monotonic() - begin:.0f}" if _state(job) not in cluster_jobs.OVER[1:] else "never"


def _state(job: Job) -> str:
    return job.cluster.job(job.number)["JobState"]


def _starts(job: Job) -> int:
    return log_of(job.checkout, job.number).count("run soaked in")


def _compare(report: Report, alone: Path, run: Path) -> None:
    whole, seen = dict(lines(alone)), lines(run)
    report.lost = len(set(whole) - {number for number, _ in seen}) + len(set(seen) - set(whole.items()))
    with suppress(AssertionError):
        check_one_curve(run, alone)
        report.same_curve = True
    ours, theirs = (Checkpoint(latest(path / "checkpoints")) for path in (run, alone))
    for kind in sorted(ours.kinds | theirs.kinds):
        a, b = ours.whole(kind), theirs.whole(kind)
        report.different += [f"{kind} of {name}" for name in b if not torch.equal(a[name], b[name])]


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Mistakes end the program before there is a cluster."""
    kinds = {f.__name__: f for f in FAULTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(kinds), help="kinds of faults, with commas; all: %(default)s")
    parser.add_argument("--shards", type=Path, default=Path("shards/digits"), help="that data/digits.py has written")
    parser.add_argument("--folder", type=Path, help="to work in; a temporary one that is removed by default")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in kinds]:
        parser.error(f"--only: there is no {', '.join(unknown)}; the kinds are {', '.join(kinds)}")
    options.kinds = [kinds[name] for name in kinds if name in wanted]
    if options.folder and (options.folder / "runs").exists():
        parser.error(f"--folder: {options.folder} has runs already, which would go on: choose another, or remove runs/")
    return options


def link(path: Path, target: Path) -> None:
    """FileExistsError if something else is there."""
    if path.resolve() != target.resolve():
        path.symlink_to(target.resolve())


def main(arguments: Sequence[str]) -> int:
    options = options_of(arguments)
    with tempfile.TemporaryDirectory() as temporary, local_cluster(Path(temporary) / "cluster") as cluster:
        folder = (options.folder or Path(temporary)).absolute()
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        link(folder / "shards" / "digits", options.shards)
        link(folder / ".venv", Path(sys.prefix))
        report = soak(folder, cluster, faults=options.faults, seed=options.seed, kinds=options.kinds)
    print(report.text())
    return 0 if report.good else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the cluster is taken down then
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it starts with &
    sys.exit(main(sys.argv[1:]))
