"""File systems that are soon full."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(path: Path, kilobytes: int) -> Iterator[Path]:
    """An empty file system of that size; without the right to mount one the test is skipped."""
    path.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(path)]
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


def room(path: Path) -> int:
    """Bytes."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_bsize
