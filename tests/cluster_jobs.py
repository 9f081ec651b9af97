"""Jobs of launch/train.sbatch on launch/local_cluster.py's nodes, and what can happen to them."""

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SMALL

INSTALLED = all(
    shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in ("slurmctld", "slurmd", "munged")
)
MARKS = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(not INSTALLED, reason="SLURM is not installed: apt-get install slurm-wlm munge"),
]
GONE = (FileNotFoundError, ProcessLookupError)  # when what is read in /proc has ended meanwhile
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
# A run with all that a fault can lose: moments, averages, evaluations, metrics.csv, Weights & Biases (offline), and a
# ledger of the samples that it has trained on.
WHOLE = [
    "experiment=digits", *(a for a in SMALL if a != "logger=csv"), "strategy=zero2", "ema=several",
    "callbacks.evaluate.at_start=false", "allowed_targets=[spies,faults,crashing]",
    "+callbacks.ledger._target_=spies.Ledger",
]  # fmt: skip


def callback(name: str, target: str, **arguments: object) -> list[str]:
    """A callback of a run: faults.Creep and the like."""
    given = [f"+callbacks.{name}.{key}={value}" for key, value in arguments.items()]
    return [f"+callbacks.{name}._target_={target}", *given]


def script():
    """launch/local_cluster.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("local_cluster", ROOT / "launch" / "local_cluster.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def local_cluster(folder: Path, nodes: int = 2, **settings: object):
    """With more cores than there are, so that nothing waits for them. settings: of slurm.conf, instead of ours."""

    class Cluster(script().LocalCluster):
        def _write(self) -> None:
            super()._write()
            ours = self.conf.read_text().splitlines()
            kept = [line for line in ours if line.split("=")[0] not in settings]
            self.conf.write_text("\n".join([*kept, *(f"{name}={value}" for name, value in settings.items()), ""]))

    return Cluster(folder, nodes=nodes, cpus=8)


def prepare(checkout: Path) -> Path:
    """A folder with shards becomes one that jobs are submitted from: with the .venv that runs this test."""
    (checkout / ".venv").symlink_to(sys.prefix)
    return checkout


def submit(cluster, checkout: Path, *arguments: str, options: Sequence[str] = ()) -> str:
    """The number of a job of two nodes with a task each, unless sbatch's options say otherwise."""
    sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", *options]
    paths = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'slurm'}"
    own = [str(ROOT / "launch" / "train.sbatch"), *arguments]
    return cluster.run(*sbatch, *own, cwd=checkout, PYTHONPATH=paths, WANDB_MODE="offline", DOCTOR="").strip()


def ended(cluster, checkout: Path, job: str, seconds: float = 300) -> tuple[dict[str, str], str]:
    """What SLURM says of a job that has ended for good, and its log, once no process and no port of it is left."""
    return over(cluster, job, lambda: log_of(checkout, job), seconds)


def over(cluster, job: str, log: Callable[[], str], seconds: float = 300) -> tuple[dict[str, str], str]:
    """`ended`, of a job with another log."""
    until(lambda: cluster.job(job)["JobState"] in OVER, log, seconds)
    until(lambda: not left_of(cluster, job), lambda: f"left of job {job}:\n{shown(left_of(cluster, job))}\n{log()}", 60)
    state = cluster.job(job)
    assert not open_ports(job, int(state["Restarts"]) + 1), log()
    return state, log()


def log_of(checkout: Path, job: str) -> str:
    path = checkout / f"slurm-{job}.log"
    return path.read_text(errors="replace") if path.is_file() else ""


def until(condition: Callable[[], bool], complaint: Callable[[], str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint()
        time.sleep(0.1)


def begun(cluster, checkout: Path, job: str, name: str, images: int = 320) -> None:
    """Returns when the run has logged so many images, which its job has not ended by then."""

    def logged() -> bool:
        assert cluster.job(job)["JobState"] not in OVER, log_of(checkout, job)
        return newest_row(checkout / "runs" / name) >= images

    until(logged, lambda: f"{name} never came to {images} images:\n{log_of(checkout, job)}", 240)


def newest_row(run: Path) -> int:
    """Images seen at the last whole row of metrics.csv."""
    path = run / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        rows = file.read().split(b"\n")[1:-1]
    return int(rows[-1].split(b",")[0]) if rows and rows[-1].split(b",")[0].isdigit() else 0


def curve(run: Path) -> list[int]:
    """Images seen at each row of metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return [int(row["images_seen"]) for row in csv.DictReader(file)]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) if pid else 0


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


def rank_of(cluster, rank: int, job: str | None = None) -> int:
    """The process of this rank that trains: its grandparent is SLURM's, its parent the shell that watches it.

    job: where there are several.
    """
    wanted = {f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0", *([f"SLURM_JOB_ID={job}"] if job else [])}  # srun: no step
    for pid in cluster.processes():
        try:
            entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
            above = parent(parent(pid))
            if wanted <= set(entries) and above and "slurmstepd" in name_of(above):
                return pid
        except GONE:
            continue
    raise AssertionError(f"there is no rank {rank}")


def importing(cluster, rank: int, job: str, before: int = 0) -> int:
    """This rank's process, once it is Python and before it can have anything to save.

    before: the same of an earlier start, which may not have ended yet.
    """
    found = []

    def there() -> bool:
        try:
            pid = rank_of(cluster, rank, job)
            found[:] = [pid] if b"diffusion_trainer" in Path(f"/proc/{pid}/cmdline").read_bytes() else []
            return found not in ([], [before]) and "python" in name_of(pid)
        except (AssertionError, *GONE):
            return False

    until(there, lambda: f"rank {rank} of job {job} never began", 120)
    return found[0]


def worker_of(cluster, rank: int, job: str | None = None) -> int:
    """The first process that reads data for this rank: a fork of it."""
    pid = rank_of(cluster, rank, job)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    forks = [int(child) for child in children if Path(f"/proc/{child}/cmdline").read_bytes() == command]
    assert forks, f"rank {rank} has no workers"
    return forks[0]


def left_of(cluster, job: str, *more: str, node: str | None = None) -> list[int]:
    """Processes that a job has started, on any node or on one, and that live still; more: of their environment."""
    found, wanted = [], {entry.encode() for entry in (f"SLURM_JOB_ID={job}", *more)}
    for pid in cluster.processes(node):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found += [pid] if wanted <= set(environment) and "slurmstepd" not in name_of(pid) else []
        except GONE:
            continue
    return found


def shown(pids: Sequence[int]) -> str:
    """What these processes are, as ps says, a line each."""
    columns = "pid,ppid,sid,stat,lstart,args"
    return subprocess.run(
        ["ps", "-ww", "-o", columns, "-p", ",".join(map(str, pids))], capture_output=True, text=True
    ).stdout


def open_ports(job: str, starts: int) -> list[int]:
    """At which starts' ports (launch/train.sbatch), of the first so many, somebody listens still."""
    listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return [start for start in range(starts) if 20000 + (int(job) + 7919 * start) % 12000 in listening]
