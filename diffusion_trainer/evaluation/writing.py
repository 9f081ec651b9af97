"""Files that appear complete or not at all, and what is to be done where they cannot be written."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_trainer.conventions import PassingError
from diffusion_trainer.training.checkpoint_files import sync

FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk, or a user's share of it, that has no room left


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what shall stand at `path`: beside it, and put in its place at the end of a block that goes well.

    Its folder is made. OSError if that cannot be done; what stood there before is intact then, and nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        sync(part)  # else an empty file may stand there after the power was lost
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def needed(path: Path, why: str) -> Iterator[None]:
    """Around writing what a start cannot do without: PassingError, in one line, where the disk is full, or fails."""
    try:
        yield
    except OSError as error:
        what = f"{path} cannot be written ({error.strerror or error}), {why}"
        raise PassingError(f"{what}: make room there, and run the same command again") from error


@contextmanager
def spared(what: str) -> Iterator[None]:
    """Around writing what a start can do without: one line where the disk is full, or fails, and the run goes on."""
    try:
        yield
    except OSError as error:
        print(f"  WARNING: {what} cannot be written ({error.strerror or error}); the run goes on without", flush=True)
