"""Locks between the processes of a node, and the threads in them: a file that is locked while somebody lives."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

HEX = "[0-9a-f]"

_held: set[int] = set()  # descriptors


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


# A lock belongs to the open file, which a fork shares: the children would keep it after the parent was killed.
os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(path: Path, wait: bool = True, create: bool = True) -> Iterator[int | None]:
    """Holds the file's lock (flock); gives its descriptor, or None where another has it and we do not wait.

    FileNotFoundError if there is no such file and none is to be made. The kernel frees the lock of a killed process.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    _held.add(descriptor)
    try:
        yield descriptor if _lock(descriptor, wait) else None
    finally:
        if descriptor in _held:  # not in a child that was forked meanwhile
            _held.discard(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone leaves it to a child that has a copy
            os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def replace_file(path: Path, data: bytes) -> None:
    """Whole and on the disk, or not at all.

    The kernel frees the lock on what is being written when its writer is killed, on whatever machine: so it can be told
    from what a living one writes.
    """
    while True:
        part = path.with_name(f".{path.name}.{uuid4().hex}.part")
        with part.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # else it was taken for a dead one's before it was locked
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else a node that loses power may keep the name without the data
                os.replace(part, path)
                return


def remove_left(folder: Path) -> None:
    """What processes that were killed were writing there with `replace_file`."""
    for part in folder.glob(f".*.{HEX * 32}.part"):
        _remove_if_left(part)


def _remove_if_left(part: Path) -> None:
    try:
        with part.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
    except (BlockingIOError, FileNotFoundError, PermissionError):
        return  # it is being written, or was whole meanwhile, or is not ours
