"""Jobs of launch/train.sbatch on launch/local_cluster.py's nodes, and what can happen to them."""

import csv
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from ledgers import lines

from diffusion_trainer.callbacks.wandb_files import points
from diffusion_trainer.training.checkpoints import Checkpoint, latest

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
    return cluster.run(*sbatch, *own, cwd=checkout, PYTHONPATH=paths, WANDB_MODE="offline").strip()


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


def left_of(cluster, job: str) -> list[int]:
    """Processes that a job has started and that live still."""
    found = []
    for pid in cluster.processes():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found += [pid] if f"SLURM_JOB_ID={job}".encode() in environment and "slurmstepd" not in name_of(pid) else []
        except FileNotFoundError:
            continue  # it has ended meanwhile
    return found


def check_nothing_lost(run: Path, alone: Path) -> None:
    """Against a run that was left alone: weights, averages, moments and schedule bitwise, the samples of each step
    (spies.Ledger), each step once in metrics.csv and with the same numbers, no evaluation missing, one W&B run.
    """
    ours, theirs = (Checkpoint(latest(path / "checkpoints")) for path in (run, alone))
    assert [ours.manifest[key] for key in ("images_seen", "optimizer_steps", "parameters")] == [
        theirs.manifest[key] for key in ("images_seen", "optimizer_steps", "parameters")
    ]
    assert ours.kinds == theirs.kinds
    for kind in theirs.kinds:
        a, b = ours.whole(kind), theirs.whole(kind)
        assert a.keys() == b.keys()
        assert not [name for name in b if not torch.equal(a[name], b[name])], kind
    assert set(lines(run)) == set(lines(alone))
    assert numbers(run) == numbers(alone)
    assert [path.name for path in (run / "checkpoints").glob(".images-*")] == []
    told, rows = points(run), numbers(run)
    assert {images for images, _ in told} == {int(row["images_seen"]) for row in rows}
    assert len({path.stem for path in (run / "wandb").glob("*run-*/run-*.wandb")}) == 1


def numbers(run: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on how fast the machine was."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: row[key] for key in row if "seconds" not in key and "per_second" not in key} for row in rows]
