"""Jobs of launch/train.sbatch on launch/local_cluster.py's nodes, and what can happen to them."""

import csv
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

INSTALLED = all(
    shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in ("slurmctld", "slurmd", "munged")
)
MARKS = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(not INSTALLED, reason="SLURM is not installed: apt-get install slurm-wlm munge"),
]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")


def script():
    """launch/local_cluster.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("local_cluster", ROOT / "launch" / "local_cluster.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def local_cluster(folder: Path, nodes: int = 2):
    """With more cores than there are, so that nothing waits for them."""
    return script().LocalCluster(folder, nodes=nodes, cpus=4)


def prepare(checkout: Path) -> Path:
    """A folder with shards becomes one that jobs are submitted from: with the .venv that runs this test."""
    (checkout / ".venv").symlink_to(sys.prefix)
    return checkout


def submit(cluster, checkout: Path, *arguments: str) -> str:
    """The number of a job of two nodes with a task each."""
    sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", str(ROOT / "launch" / "train.sbatch")]
    paths = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'slurm'}"
    return cluster.run(*sbatch, *arguments, cwd=checkout, PYTHONPATH=paths).strip()


def ended(cluster, checkout: Path, job: str, seconds: float = 300) -> tuple[dict[str, str], str]:
    """What SLURM says of a job that has ended for good, and its log."""
    until(lambda: cluster.job(job)["JobState"] in OVER, lambda: log_of(checkout, job), seconds)
    return cluster.job(job), log_of(checkout, job)


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


def rank_of(cluster, rank: int) -> int:
    """The process of this rank that trains: its grandparent is SLURM's, its parent the shell that watches it."""
    for pid in cluster.processes():
        try:
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            above = parent(parent(pid))
            mine = {f"SLURM_PROCID={rank}".encode(), b"SLURM_STEP_ID=0"} <= set(entries)  # srun is in no step
            if mine and above and "slurmstepd" in name_of(above):
                return pid
        except FileNotFoundError:
            continue  # it has ended meanwhile
    raise AssertionError(f"there is no rank {rank}")


def worker_of(cluster, rank: int) -> int:
    """The first process that reads data for this rank: a fork of it."""
    pid = rank_of(cluster, rank)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    forks = [int(child) for child in children if Path(f"/proc/{child}/cmdline").read_bytes() == command]
    assert forks, f"rank {rank} has no workers"
    return forks[0]
