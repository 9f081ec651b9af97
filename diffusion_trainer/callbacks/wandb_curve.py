"""Weights & Biases without a say in the training: told from a thread of its own, which may fail and may be given up."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

import wandb
from PIL.Image import Image

from diffusion_trainer.callbacks.run_logger import RunLogger
from diffusion_trainer.callbacks.wandb_session import OFFLINE, Session, alone

WAITING = 10_000  # entries at most that wait for a service that has stopped to listen
FAILED_SECONDS = 5  # for the end of a run that failed
KILLED_SECONDS = 5  # until a thread has seen that its service is dead
Entry = Callable[[Session], Any]


class WandbCurve(RunLogger):
    """One run and one curve over images seen, however often the training is restarted, and each point of it once: what
    the server has (offline: the records in the folder) is not told again, what it lacks is made up for from the folder.

    A session that fails (no network, a wrong key, its service is killed) is followed by one offline, and that by none.
    Training waits for the start, at most `init_timeout_seconds` and some, and for the end, at most
    `finish_timeout_seconds`.
    """

    def __init__(
        self,
        folder: Path,
        mode: str,
        begin: Callable[[str], Any],
        started_at: int,
        init_timeout_seconds: float,
        finish_timeout_seconds: float,
    ):
        """begin: makes the wandb.Run, in a mode; started_at: images seen."""
        self.folder, self.mode, self._begin, self._reached = folder, mode, begin, started_at
        self.init_timeout_seconds, self.finish_timeout_seconds = init_timeout_seconds, finish_timeout_seconds
        self._entries: Queue[Entry | None] = Queue(WAITING)
        self._begun, self._abandoned, self._told_full, self._exit_code = Event(), False, False, 0
        self._thread = Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        self._begun.wait(init_timeout_seconds + KILLED_SECONDS)

    @property
    def name(self) -> str:
        return "wandb"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row, self._reached = {"images_seen": step, **metrics}, max(self._reached, step)
        self._put(lambda session: session.log(row))

    def log_picture(self, name: str, picture: Image, images_seen: int) -> None:
        self._put(lambda session: session.log({"images_seen": images_seen, name: picture}))

    def alert(self, title: str, text: str) -> None:
        self._put(lambda session: session.run.alert(title=title, text=text, level="WARN"))

    def finalize(self, status: str) -> None:
        """Ends the run. A service that does not come to its end is killed, for it would hold up that of the process."""
        self._exit_code = int(status != "success")
        self._put(None)
        # The other ranks wait for one that has failed until it has ended.
        most = self.finish_timeout_seconds
        seconds = most if status == "success" else min(FAILED_SECONDS, most)
        self._thread.join(seconds)
        if not self._thread.is_alive():
            return
        self._abandoned = True
        _say(f"Weights & Biases has not ended within {seconds:g} s, and is left. {self._later}")
        _kill_services()
        self._thread.join(KILLED_SECONDS)

    def _put(self, entry: Entry | None) -> None:
        if not self._thread.is_alive():
            return  # it has said so
        try:
            self._entries.put_nowait(entry)
        except Full:
            if not self._told_full:
                _say(f"Weights & Biases does not take what it is told: {WAITING:,} entries wait. {self._later}")
            self._told_full = True

    @property
    def _later(self) -> str:
        return f"Training goes on, and metrics.csv has all; {sending(self.folder)} sends later what is missing"

    def _work(self) -> None:
        unsent: list[Entry | None] = []
        for attempt, mode in enumerate((self.mode, OFFLINE)):
            # Offline it disturbs nobody: what `wandb-sync` is sending meanwhile is known later.
            turn = nullcontext() if mode == OFFLINE else alone(self.folder, self.init_timeout_seconds)
            try:
                with turn:
                    self._session(mode, unsent)
                return
            except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever it is, it is told, and training goes on)
                if not self._abandoned:
                    then = "goes on offline" if attempt == 0 else "is left"
                    _say(f"Weights & Biases failed ({_one_line(error)}), and {then}. {self._later}")
                _end_service()
                if self._abandoned:
                    break
        self._begun.set()

    def _session(self, mode: str, unsent: list[Entry | None]) -> None:
        """unsent: the entry that the session before has failed in."""
        session = Session(self.folder, mode, self._begin)
        self._begun.set()
        session.catch_up(self._reached)  # images seen when it began: all later is told by itself
        if session.online:
            session.leave_out()
        while True:
            if not unsent:
                unsent.append(self._entries.get())
            if unsent[0] is None:
                break
            unsent[0](session)
            unsent.clear()
        session.run.finish(exit_code=self._exit_code)
        with suppress(SystemExit):  # wandb's, if its service does not end as it should: all has been said
            wandb.teardown()
        if mode == OFFLINE:
            print(f"  Weights & Biases was offline: {sending(self.folder)} sends the run", flush=True)


def sending(folder: Path) -> str:
    return f"`diffusion-trainer wandb-sync run={folder}`"


def _say(text: str) -> None:
    print(f"  WARNING: {text}", flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _end_service() -> None:
    """So that the next session starts one of its own, and the end of the process waits for none."""
    _kill_services()
    with suppress(OSError, SystemExit):  # to say goodbye fails, now that it is dead, or wandb exits with its -9
        wandb.teardown()


def _kill_services() -> None:
    """The wandb-core processes that this one has started."""
    for pid in _children():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended by itself
            if Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core":
                os.kill(pid, signal.SIGKILL)


def _children() -> Iterator[int]:
    """Of all threads of this process; the threads come and go."""
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            yield from map(int, (task / "children").read_text().split())
