"""Where the points of a sweep run: each in a process tree of its own."""

import ctypes
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from diffusion_trainer.apps.places import Point
from diffusion_trainer.apps.planning import Check, Planner, Show

COMMAND = (sys.executable, "-m", "diffusion_trainer")


class Started(ABC):
    """A point that was started."""

    job: str | None = None  # of SLURM

    @abstractmethod
    def code(self) -> int | None:
        """The exit code; None while it runs."""

    @abstractmethod
    def stop(self, number: int) -> None:
        """The sweep was sent this signal."""

    @abstractmethod
    def prune(self) -> bool:
        """Has it save and end for good; False if it could not be told yet."""


class Launcher(ABC):
    """A choice of conf/runner."""

    at_once: int | None  # points that run at the same time, at most; None: as many as the course likes
    lives_on: bool  # whether they do so without the sweep
    seconds: float  # between two looks at them

    def planner(self, verb: str, show: Show, check: Check | None) -> Planner:
        """Of points that can run here; show and check are the verb's own."""
        return Planner(verb, show, check)

    @abstractmethod
    def start(self, verb: str, point: Point, job: str | None, held: int) -> Started:
        """Starts the point, or goes on watching the job that an earlier sweep has started for it.

        held: a descriptor that the next sweep in this folder waits for as long as a process has it open. UserError if
        it cannot be started.
        """


class LocalPoint(Started):
    def __init__(self, process: subprocess.Popen):
        self.process = process

    def code(self) -> int | None:
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def stop(self, number: int) -> None:
        self.process.send_signal(number)

    def prune(self):
        self.process.send_signal(signal.SIGTERM)
        return True


@dataclass(frozen=True)
class Local(Launcher):
    """On this machine, one after the other.

    A point has a process group of its own: it gets each signal once, from the sweep, whoever sent it. SIGTERM when the
    sweep is killed.
    """

    at_once = 1
    lives_on = False
    seconds = 0.05

    def start(self, verb: str, point: Point, job: str | None, held: int) -> Started:
        return LocalPoint(start([*COMMAND, verb, *point.overrides], held))


def start(command: Sequence[str], held: int) -> subprocess.Popen:
    parent = os.getpid()

    def end_with_parent() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(128 + signal.SIGTERM)

    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=end_with_parent, pass_fds=(held,)
    )
