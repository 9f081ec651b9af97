"""The starts of a run, numbered: <run>/logs/attempt-<n> has what each rank has printed in it."""

import errno
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from diffusion_trainer.callbacks.last_words import RankFiles, attempt_folder
from diffusion_trainer.callbacks.redaction import redacted
from diffusion_trainer.callbacks.run import RunCallback
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import spared
from diffusion_trainer.training.agreement import Agreement

KEPT = 10  # attempts whose folders are kept, this one among them
GONE = (errno.EIO, errno.EPIPE, errno.EBADF)  # errors of a terminal that was closed, a pipe that nobody reads any more
NUMBER = "DIFFUSION_TRAINER_ATTEMPT"  # variable by which a rank knows its attempt from the parent that has begun it


def numbers(logs: Path) -> list[int]:
    """Of the attempts whose folders there are, ascending."""
    found = (path.name.removeprefix("attempt-") for path in logs.glob("attempt-*"))
    return sorted(int(name) for name in found if name.isdecimal())


def begin(logs: Path) -> int:
    """A number of its own, even where another start takes one at the same moment; the oldest folders are deleted. On a
    full disk the folder comes with the first line for which there is room (`RankLog`).
    """
    logs.mkdir(parents=True, exist_ok=True)
    earlier = numbers(logs)
    number = max(earlier, default=0) + 1
    while not _made(attempt_folder(logs, number)):
        number += 1
    for old in earlier[: max(0, len(earlier) - KEPT + 1)]:
        shutil.rmtree(attempt_folder(logs, old), ignore_errors=True)  # another start may be at it
    return number


def _made(folder: Path) -> bool:
    with spared(f"{folder}, for the logs of this start,"):
        try:
            folder.mkdir()
        except FileExistsError:
            return False
    return True


def given() -> int | None:
    """The attempt that the parent of this process has begun; None if nobody has."""
    return int(os.environ[NUMBER]) if NUMBER in os.environ else None


class RankLog:
    """What a rank prints, once more: into its file of the attempt, as soon as that is known.

    A file that cannot be written is told once, and tried again with the next line: a disk is full for a while. What is
    said before `keep`, or never to be kept, costs its memory.
    """

    def __init__(self):
        self._waiting: list[str] | None = []  # None: it goes to the file, or to none
        self._files: RankFiles | None = None
        self._descriptor: int | None = None
        self._warned = False

    def keep(self, files: RankFiles) -> None:
        waiting, self._waiting, self._files = self._waiting or [], None, files
        self.write("".join(waiting))

    def leave(self) -> None:
        """There is to be no file: somebody else writes it."""
        self._waiting = None

    def write(self, text: str) -> None:
        if self._waiting is not None:
            self._waiting.append(text)
        elif self._files is not None and text:
            self._append(self._files.log, text)

    def _append(self, path: Path, text: str) -> None:
        try:
            if self._descriptor is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            data = text.encode(errors="replace")
            while data:  # at once: a process may be killed at any moment
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            warned, self._warned = self._warned, True
            if not warned:
                print(f"  WARNING: {path} cannot be written ({error.strerror}): it has gaps", file=sys.stderr)

    def close(self) -> None:
        self._files, descriptor, self._descriptor = None, self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class Stream:
    """sys.stdout or sys.stderr: without secrets, to its own place as long as there is one, and to the log."""

    def __init__(self, stream: TextIO, log: RankLog):
        self._stream, self._log = stream, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        shown = redacted(text)
        self._log.write(shown)
        self._try(lambda: self._stream.write(shown))
        return len(text)

    def writelines(self, lines) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action) -> None:
        try:
            action()
        except OSError as error:  # what is to be saved matters more
            if error.errno in GONE:
                self._stream = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)


@contextmanager
def printing() -> Iterator[RankLog]:
    """What this process prints inside loses its secrets, ends nothing when its terminal goes, and reaches the log,
    which has the error, too, that ends it.
    """
    log, before = RankLog(), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = (Stream(stream, log) for stream in before)
    try:
        yield log
    except BaseException as error:
        told = f"error: {error}\n" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        log.write(redacted(told))
        raise
    finally:
        sys.stdout, sys.stderr = before
        log.close()


@dataclass
class Start:
    """Which attempt this is: rank 0 or the parent knows it first; the others, as soon as they can talk."""

    log: RankLog
    logs: Path
    rank: int
    attempt: int | None = None

    def begin(self) -> None:
        parents = given()
        if parents is not None and self.rank:
            self.attempt = parents
            self.log.leave()  # what this process prints stands in the file already
        elif self.rank == 0:
            self._is(begin(self.logs) if parents is None else parents)

    def meet(self, agreement: Agreement, callbacks: Sequence[RunCallback]) -> None:
        """All ranks must call it."""
        (known, *_) = agreement.gather(self.attempt)
        if self.attempt is None:
            self._is(known)
        for callback in callbacks:
            callback.attempt = known

    def _is(self, number: int) -> None:
        self.attempt = number
        self.log.keep(RankFiles(self.logs, self.rank, number))
