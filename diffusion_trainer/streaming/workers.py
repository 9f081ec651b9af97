"""Pieces out of a DataLoader whose workers may be killed."""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from diffusion_trainer.conventions import PassingError

# What torch says then. An error that a worker has caught begins otherwise and brings its traceback.
_DEATH = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (exited unexpectedly|is killed by signal)")


class DeadWorker(PassingError):
    """A process that reads data has ended before its time."""


class Watch:
    """Stands before torch's handler of SIGCHLD, which raises in whatever the main thread is executing when a worker
    dies: in the middle of a step, mostly. Here that waits until the next piece is asked for.

    While one is awaited it is raised at once: the dead may have left half of a piece in the pipe.
    """

    def __init__(self, handler: Callable | int | None):
        self.handler, self.awaiting = handler, False
        self.death: str | None = None  # an exception would keep the frames that it was raised in

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.handler(number, frame)
        except RuntimeError as error:
            if self.awaiting or not _DEATH.match(str(error)):
                raise
            self.death = str(error)

    def next(self, pieces: Iterator) -> Any:
        """None if there are no more; RuntimeError, torch's, if a worker has died."""
        self.awaiting = True  # first: what is raised from here on is not missed below
        try:
            if self.death is not None:
                raise RuntimeError(self.death)
            return next(pieces, None)
        finally:
            self.awaiting = False


def pieces(loader: DataLoader) -> Iterator[Any]:
    """In order; DeadWorker, after which there are none: torch would wait for the dead one's next piece for ever."""
    try:
        found = iter(loader)
        watch = _watch()
        while (piece := watch.next(found)) is not None:
            yield piece
    except RuntimeError as error:
        if not _DEATH.match(str(error)):
            raise
        raise DeadWorker(
            f"{str(error).splitlines()[0].strip()} Perhaps the memory did not suffice: use fewer data.num_workers or a "
            "smaller data.prefetch. The newest checkpoint stands: run the same command again to resume from it"
        ) from None


def _watch() -> Watch:
    """The process's one, once torch has its handler. Only the main thread may change handlers, or has torch set one."""
    handler = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, Watch):
        handler.death = None  # of a loader that nobody asks any more
        return handler
    watch = Watch(handler)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, watch)
    return watch
