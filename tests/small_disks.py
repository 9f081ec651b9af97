"""File systems that are soon full."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffusion_trainer.callbacks.run import FIRST, RunCallback

FILLER, NAMES = "filler", "names"  # what takes all the room; a folder of files that take all names


@contextmanager
def mounted(path: Path, kilobytes: int, names: int = 500) -> Iterator[Path]:
    """An empty file system of that size; without the right to mount one the test is skipped.

    names: of files and folders that it has room for.
    """
    path.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,nr_inodes={names}", "none", str(path)]
    made = subprocess.run(asked, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"only who may mount can have a small file system here: {made.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(path: Path) -> None:
    """Makes a file of all the room that there is."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            while room(path) >= size:
                file.write(bytes(size))


def fill_names(path: Path) -> None:
    """Makes a folder of so many empty files that no file can be made any more, as on many a full disk."""
    path.mkdir()
    try:
        for number in range(1 << 16):
            (path / str(number)).touch()
    except OSError:
        return
    raise AssertionError(f"{path} has names for more")


class Emptied(RunCallback):
    """Somebody makes room in the run's folder, where it was full, once the run has seen so many images. With STOP_AT in
    the environment the run is told to stop at so many.
    """

    turn = FIRST

    def __init__(self, at_images: int):
        self.at_images = at_images

    def after_step(self, previous: int) -> None:
        if str(self.run.images_seen) == os.environ.get("STOP_AT"):
            self.run.stop_signal = signal.SIGTERM
        if self.run.first and self.run.images_seen == self.at_images:
            (self.run.folder / FILLER).unlink(missing_ok=True)
            shutil.rmtree(self.run.folder / NAMES, ignore_errors=True)


def room(path: Path) -> int:
    """Bytes."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_bsize
