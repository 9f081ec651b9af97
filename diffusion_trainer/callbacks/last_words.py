"""What one rank of a run leaves under <run>/logs for whoever asks afterwards why the run ended."""

import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusion_trainer.callbacks.redaction import redacted

STATE_BYTES = 1024  # of the file, which never is shorter than before
FRAMES = 12  # of a stack, the last ones
HANG = "hung: no progress for"  # how the last words of a rank begin that has waited too long
SUSPENDED = "suspended, or its Python was, for"  # and what they go on with if it could not move
STARVED = "waiting for data"  # what such a rank was doing, if no other is to blame


def attempt_folder(logs: Path, attempt: int) -> Path:
    return logs / f"attempt-{attempt}"


@dataclass(frozen=True)
class RankFiles:
    """The files of rank `rank`, in the folder `logs` that all ranks share: of the last start, but for `log`."""

    logs: Path
    rank: int
    attempt: int | None = None  # which start it is, where that is known (attempts.py)

    @property
    def state(self) -> Path:
        """How far it has come, as JSON (`State`), a second old at most; deleted when it ends well."""
        return self.logs / f"state-rank-{self.rank}.json"

    @property
    def stacks(self) -> Path:
        """Of all its threads: when it hung, and whenever it is sent SIGQUIT."""
        return self.logs / f"stacks-rank-{self.rank}.txt"

    @property
    def failed(self) -> Path:
        """What ended it, in some twenty lines."""
        return self.logs / f"failed-rank-{self.rank}.txt"

    @property
    def log(self) -> Path:
        """All that it has printed in this attempt."""
        return attempt_folder(self.logs, self.attempt) / f"rank-{self.rank}.log"


@dataclass(frozen=True)
class State:
    """How far a rank has come."""

    rank: int
    world: int
    host: str
    pid: int
    doing: str
    step: int
    images_seen: int
    at: float  # seconds since 1970, when it began to do that
    attempt: int | None = None  # see RankFiles

    def __str__(self) -> str:
        where = f"rank {self.rank} of {self.world} on {self.host} (pid {self.pid})"
        return f"{where}, at step {self.step:,}, {self.images_seen:,} images ({self.doing})"

    def json(self) -> str:
        return json.dumps(asdict(self))


def write_state(files: RankFiles, state: State) -> None:
    """Over the one before, at once: whoever is killed meanwhile, or reads, has one of both."""
    descriptor = os.open(files.state, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(descriptor, state.json().ljust(STATE_BYTES).encode(), 0)
    finally:
        os.close(descriptor)


def state_of(files: RankFiles) -> State | None:
    """The last one written; None if it never was, or only half of it, or by another version of this program."""
    try:
        return State(**json.loads(files.state.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def unknown(rank: int, world: int) -> State:
    """Of this process, which has not begun to train."""
    return State(rank, world, socket.gethostname(), os.getpid(), "the start", 0, 0, time.time())


def write_failure(files: RankFiles, state: State, what: str, frames: Iterable[str]) -> None:
    """Without secrets. what: one line; frames: of the stack, as `traceback` formats them, the innermost last."""
    stack = "".join(list(frames)[-FRAMES:]).rstrip()
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    files.logs.mkdir(parents=True, exist_ok=True)
    part = files.failed.with_name(f".{files.failed.name}.part")
    part.write_text(redacted(f"{now}: {state}:\n{what}\n{stack}\n"))
    part.replace(files.failed)
