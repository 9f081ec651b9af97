"""Who may use a run's folder: one start at a time, held by a lock that ends with its processes.

In the lock stands the start of a job that had it last.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from diffusion_trainer.apps.folder import LOCK, LOGS
from diffusion_trainer.callbacks.job_starts import JobStart, remove_old_stop_files
from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.evaluation.writing import FULL, spared

LOST_SECONDS = 600  # that a start of a job, whose node SLURM has lost, may take to save and stop


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """The folder, ours alone; UserError if a living process holds it, or it cannot be written (PassingError: it is
    full).

    Yields the lock's descriptor: while a process that inherited it lives, the folder is held.
    """
    try:
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        kind = PassingError if error.errno in FULL else UserError  # there may be room at the next start
        raise kind(f"folder={folder} cannot be written ({error}); choose another folder=...") from error
    with file as lock:
        if not taken(lock):
            _stop_lost_start(folder, lock)
        remove_old_stop_files(folder)
        _sign(lock)
        yield lock.fileno()


def _sign(lock: IO[str]) -> None:
    """Writes down whose start this is, for later ones and for this one's other ranks."""
    lock.seek(0)
    ours = str(JobStart.current() or "")
    if lock.read() != ours:
        with spared(f"the name of this start in {lock.name}, by which the job's next would know it,"):
            lock.truncate(0)  # which is enough for the other ranks
            os.write(lock.fileno(), ours.encode())
            os.fsync(lock.fileno())  # other nodes see it now


def _lost_start(folder: Path) -> JobStart | None:
    """The earlier start of this very job that has used the folder last, or still does."""
    ours, last = JobStart.current(), JobStart.read((folder / LOCK).read_text())  # opened anew: NFS would not look again
    return last if ours and last and last.came_before(ours) else None


def _stop_lost_start(folder: Path, lock: IO[str]) -> None:
    """Waits until an earlier start of this very job has saved and stopped: where the daemon of a node dies, SLURM
    starts the job elsewhere, and the ranks there go on. UserError if it is another run that holds the folder.
    """
    end, told = time.monotonic() + LOST_SECONDS, None
    while not taken(lock):
        lost = _lost_start(folder)
        if lost is None:
            raise UserError(f"another process is training in {folder}; wait for it or give this run another name=...")
        earlier = f"an earlier start of job {lost.job}"
        if lost != told:
            print(f"{earlier} still trains in {folder}, on a node that SLURM has lost: it is told to stop", flush=True)
        told = lost
        lost.stop_file(folder).touch()
        if time.monotonic() > end:
            raise PassingError(f"{earlier} has not stopped within {LOST_SECONDS} s in {folder}")
        time.sleep(1)


def wait_for_first_rank(folder: Path) -> None:
    """Of the other ranks, before they look where the run is: until rank 0 has the folder, where an earlier start of
    this job had it. They might find the run elsewhere than rank 0 will, and wait for it with a collective's time-out.
    """
    end = time.monotonic() + 2 * LOST_SECONDS  # it may begin last
    while (folder / LOCK).exists() and _lost_start(folder):
        if time.monotonic() > end:
            raise PassingError(f"rank 0 has not begun within {2 * LOST_SECONDS} s in {folder}")
        time.sleep(1)


def taken(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock is ours now, and no living process has it. UserError where the file system has no locks."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be locked ({error.strerror}), so two processes could write there at once: mount that "
            "file system with locks (Lustre: -o flock; NFS: its lock service), or choose another folder=..."
        ) from error
    return True


def is_locked(path: Path) -> bool:
    """Whether a living process has this lock now."""
    try:
        with path.open() as lock:
            return not taken(lock, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
