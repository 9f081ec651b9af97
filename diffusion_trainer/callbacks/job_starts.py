"""Which start of a job of SLURM this process belongs to, and the files by which a run is told to stop."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

STOP = "stop"  # a file in a run's folder, made by hand: as a SIGTERM


@dataclass(frozen=True)
class JobStart:
    """number: 0 for a job's first start, one more each time that SLURM starts it again."""

    job: str
    number: int

    @classmethod
    def current(cls) -> Self | None:
        """None outside of a job."""
        job = os.environ.get("SLURM_JOB_ID")
        return cls(job, int(os.environ.get("SLURM_RESTART_COUNT", 0))) if job else None

    @classmethod
    def read(cls, text: str) -> Self | None:
        """From what `str` has made of it; None from anything else."""
        found = re.fullmatch(r"(\d+)\.(\d+)", text)
        return cls(found[1], int(found[2])) if found else None

    def __str__(self) -> str:
        return f"{self.job}.{self.number}"

    def came_before(self, other: "JobStart") -> bool:
        return self.job == other.job and self.number < other.number

    def stop_file(self, folder: Path) -> Path:
        """Tells this start, and no other, to stop: whoever makes it may be killed before it can take it away."""
        return folder / f"{STOP}-{self}"


def stop_files(folder: Path) -> list[Path]:
    """What this process is told to stop by."""
    start = JobStart.current()
    return [folder / STOP, *([start.stop_file(folder)] if start else [])]


def remove_stop_files(folder: Path) -> None:
    for path in stop_files(folder):
        path.unlink(missing_ok=True)


def remove_old_stop_files(folder: Path) -> None:
    """Those for starts that are over, as all are once the folder is ours. One that was made by hand stays."""
    for path in folder.glob(f"{STOP}-[0-9]*.[0-9]*"):
        path.unlink(missing_ok=True)
