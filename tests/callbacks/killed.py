"""A stand-in for SIGKILL in runs that are computed in the process of the tests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Killed(Exception):
    """Stands for SIGKILL: nothing below the trainer handles it."""


@contextmanager
def in_a_process() -> Iterator[None]:
    """Around a run: what writes its checkpoint has ended when the block has, as if it had been killed after that."""
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
