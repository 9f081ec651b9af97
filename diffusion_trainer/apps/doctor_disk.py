"""The doctor's checks of what the run writes to: its folder, how fast a checkpoint gets there, and temporary files."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from diffusion_trainer.apps.doctor_facts import Run, nearest, scratch
from diffusion_trainer.apps.findings import (
    Check,
    Failed,
    Finding,
    Measured,
    Process,
    error,
    grouped,
    nodes_of,
    ok,
    size_of,
    time_of,
    warning,
)
from diffusion_trainer.callbacks.checkpointing import SAVE_SECONDS
from diffusion_trainer.callbacks.ema_snapshots import FOLDER as SNAPSHOTS
from diffusion_trainer.evaluation.writing import FULL
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoint_files import write_tensors
from diffusion_trainer.training.checkpoints import latest
from diffusion_trainer.training.resuming import resumable

WRITTEN_BYTES = 1 << 24  # by each process, to see how fast
TMPDIR_BYTES = 100_000_000  # for sockets and logs of libraries
COMPILING_BYTES = 2_000_000_000  # torch.compile keeps what it has made there
SHARED_MEMORY_BYTES = 1_000_000_000  # NCCL between the GPUs of a node; containers often have 64 MB


@dataclass(frozen=True)
class Folder(Check):
    """Whether all nodes see the run's folder, and whether there is room for its checkpoints. A run that has one goes on
    on a full disk: it keeps what it has, says so at each save, and trains meanwhile.
    """

    run: Run

    name = "run folder"
    mend = "choose another folder=... on a file system that all nodes see and may write to"
    seconds = float("inf")

    def measure(self, here: Process, agreement: Agreement) -> Mapping[str, Any] | None:
        problem, full = _unseen(self.run.folder, here.rank == 0, agreement)
        if not here.leads:
            return None
        at, folder = nearest(self.run.folder), self.run.folder
        needed = max(0, self.run.kept_bytes - bytes_of_checkpoints(folder, "checkpoints"))
        saved = latest(folder / "checkpoints") is not None
        later = max(0, self.run.snapshot_bytes - bytes_of_checkpoints(folder, SNAPSHOTS))
        free = shutil.disk_usage(at).free
        room = {"path": str(at), "free": free, "needed": needed, "later": later, "saved": saved}
        return {"problem": problem, "spared": saved and full, **room}

    def judge(self, measured: Measured) -> Iterator[Finding]:
        problems = grouped([(p, (v["problem"], v["spared"])) for p, v in measured if v["problem"]])
        for (problem, spared), processes in problems.items():
            yield (warning if spared else error)(self.name, problem, self.mend, nodes_of(processes))
        _, least = min(measured, key=lambda item: item[1]["free"])
        says = f"{size_of(least['free'])} free in {least['path']}, {size_of(least['needed'])} for checkpoints"
        says += f", {size_of(least['later'])} for snapshots of averages to the end" if least["later"] else ""
        if least["free"] < least["needed"]:
            mend = "make room, choose another folder=..., or keep fewer: callbacks.checkpoint.keep=1"
            yield (warning if least["saved"] else error)(self.name, says, mend)
        elif least["free"] < least["needed"] + least["later"]:
            mend = "make room meanwhile, or take fewer snapshots: a larger every_n_images of theirs"
            yield warning(self.name, says, mend)
        elif not problems:
            yield ok(self.name, says)


def bytes_of_checkpoints(folder: Path, kind: str) -> int:
    """Of a run that may be training: a checkpoint that it takes away meanwhile counts no more. kind: their folder."""
    total = 0
    for path in glob(f"{kind}/images-*/*", root_dir=folder):  # unlike Path's it passes over folders that are gone
        with suppress(FileNotFoundError):
            total += (folder / path).stat().st_size
    return total


def _unseen(folder: Path, first: bool, agreement: Agreement) -> tuple[str | None, bool]:
    """Why the run's folder cannot be used here: the first process cannot write, or what it has written is not here; and
    whether that is for want of room alone.
    """
    if not first:
        path = agreement.gather(None)[0]
        seen = path is None or Path(path).exists()  # where it could not write, it says so
        agreement.any(False)
        return (None if seen else f"{folder.absolute()} is not the folder that rank 0 writes to"), False
    told = False
    try:
        with scratch(folder) as path:
            told = True
            agreement.gather(str(path.absolute()))
            agreement.any(False)
    except OSError as problem:
        return f"{type(problem).__name__}: {problem}", problem.errno in FULL
    finally:
        if not told:
            agreement.gather(None)
            agreement.any(False)
    return None, False


@dataclass(frozen=True)
class Saving(Check):
    """How long a checkpoint takes: as long as the run's last one; before the first some megabytes are written just so,
    by all processes that will write, at once. Where there is no room for that, a run that has a checkpoint goes on.
    """

    run: Run
    lead_seconds: float

    name = "saving"
    mend = "choose another folder=... that can be written to"
    seconds = 20

    def measure(self, here: Process, agreement: Agreement) -> Mapping[str, float | None] | Failed | None:
        if here.rank and not self.run.sharded:
            return None
        total, took = self.run.checkpoint_bytes, last_save(self.run.folder)
        if took is not None:
            return {"bytes": total, "took": took}
        most = max(65536, min(WRITTEN_BYTES, total))
        try:
            with scratch(self.run.folder) as path:
                # The first, to which all is new, does not count.
                _, larger, smaller = (_written(path / str(i), size) for i, size in enumerate((most, most, most // 16)))
        except OSError as problem:
            if problem.errno not in FULL or latest(self.run.folder / "checkpoints") is None:
                raise
            mend = "make room: until then nothing new is saved"
            return Failed(f"not measured: {problem.strerror}", mend, exit_code=0)
        speed, latency = speed_of(*smaller, *larger)
        return {"speed": speed, "latency": latency, "bytes": total, "took": None}

    def judge(self, measured: Measured) -> Iterator[Finding]:
        total = measured[0][1]["bytes"]
        takes = next((v["took"] for _, v in measured if v["took"] is not None), None)
        known, says = takes is not None, f"a checkpoint of {size_of(total)}"
        if known:
            says += f" took {time_of(takes)} the last time"
        else:
            nodes = grouped([(p, p.node) for p, _ in measured])  # of replicated state only rank 0's
            speeds = {node: sum(v["speed"] for p, v in measured if p.node == node) for node in nodes}
            latency = max(v["latency"] for _, v in measured)
            takes = max(total / len(nodes) / speed for speed in speeds.values()) + latency
            says += f" takes about {time_of(takes)} ({size_of(sum(speeds.values()))}/s after {time_of(latency)})"
        lead = f"the signal comes {self.lead_seconds:.0f} s before the end"
        longer = max(60, round(4 * takes))
        mend = (
            f"submit signal_lead_seconds={longer} (by hand LEAD={longer} sbatch --signal=TERM@{longer} ...), or choose "
            "a faster file system for folder=..."
        )
        if takes > self.lead_seconds:
            yield (error if known else warning)(self.name, f"{says}; {lead}", mend)
        elif 2 * takes > self.lead_seconds:
            yield warning(self.name, f"{says}, twice that if one is being written already; {lead}", mend)
        else:
            yield ok(self.name, f"{says}; {lead}")


def last_save(folder: Path) -> float | None:
    """Seconds; None before the first. UserError where no checkpoint of the run is whole."""
    newest = resumable(folder / "checkpoints", Agreement(alone=True), thorough=False).checkpoint
    return newest.manifest["state"].get(SAVE_SECONDS) if newest else None


def _written(path: Path, size: int) -> tuple[int, float]:
    """Bytes, and the seconds that they took."""
    tensors = {"numbers": torch.rand(size // 4)}  # what can be compressed would be written faster
    begin = perf_counter()
    return write_tensors(path, tensors).size, perf_counter() - begin


def speed_of(small: int, its_seconds: float, large: int, seconds: float) -> tuple[float, float]:
    """Bytes per second, and the seconds that a file of any size takes besides; all of them the former's where the
    larger of two files was not the slower one.
    """
    if seconds <= its_seconds:
        return large / seconds, 0.0
    speed = (large - small) / (seconds - its_seconds)
    return speed, max(0.0, its_seconds - small / speed)


@dataclass(frozen=True)
class TemporaryFiles(Check):
    """$TMPDIR. Checkpoints do not go through it, but libraries want it, torch.compile most of all."""

    compiles: bool

    name = "$TMPDIR"
    mend = "export TMPDIR=<a folder on a local disk of the node> in the job's script"

    def measure(self, here: Process, agreement: Agreement) -> Mapping[str, Any] | None:
        if not here.leads:
            return None
        folder = os.environ.get("TMPDIR") or tempfile.gettempdir()  # Python passes over one that cannot be written
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
        needed = COMPILING_BYTES if self.compiles else TMPDIR_BYTES
        return {"path": folder, "free": shutil.disk_usage(folder).free, "needed": needed}

    def judge(self, measured: Measured) -> Iterator[Finding]:
        yield from _room(self, measured)


@dataclass(frozen=True)
class SharedMemory(Check):
    """/dev/shm. Batches do not go through it; NCCL between the GPUs of a node does, and semaphores."""

    run: Run

    name = "/dev/shm"
    mend = "start the container with more of it: --shm-size=8g, or --ipc=host"

    def measure(self, here: Process, agreement: Agreement) -> Mapping[str, Any] | None:
        if not here.leads or sys.platform != "linux":
            return None
        needed = SHARED_MEMORY_BYTES if self.run.gpu and self.run.local_size > 1 else 1_000_000
        return {"path": "/dev/shm", "free": shutil.disk_usage("/dev/shm").free, "needed": needed}

    def judge(self, measured: Measured) -> Iterator[Finding]:
        yield from _room(self, measured)


def _room(check: Check, measured: Measured) -> Iterator[Finding]:
    small = [(p, (v["path"], v["free"], v["needed"])) for p, v in measured if v["free"] < v["needed"]]
    for (path, free, needed), processes in grouped(small).items():
        says = f"{size_of(free)} free in {path}, {size_of(needed)} may be needed"
        yield warning(check.name, says, check.mend, nodes_of(processes))
    if not small:
        least = min((v for _, v in measured), key=lambda v: v["free"])
        yield ok(check.name, f"{size_of(least['free'])} free in {least['path']}")
