"""Where the points of a sweep run: each in a process tree of its own.

Hydra's own launchers run points inside the sweep's process (basic) or in workers of a pool (joblib), where a point of
several ranks starts the others with the sweep's command line: other parameters on other ranks, in silence.
"""

import ctypes
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch

from diffusion_trainer.apps.places import Point
from diffusion_trainer.apps.planning import Check, Planner, Show
from diffusion_trainer.conventions import UserError

COMMAND = (sys.executable, "-m", "diffusion_trainer")


class Started(ABC):
    """A point that was started."""

    job: str | None = None  # of SLURM
    log: Path | None = None  # what it prints, if that is not here

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
    def __init__(self, process: subprocess.Popen, log: Path | None):
        self.process, self.log = process, log

    def code(self) -> int | None:
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def stop(self, number: int) -> None:
        self.process.send_signal(number)

    def prune(self):
        self.process.send_signal(signal.SIGTERM)
        return True


@dataclass(frozen=True)
class Share:
    """What of this machine a point has for itself. None: all of it."""

    gpus: str | None = None  # as CUDA_VISIBLE_DEVICES names them
    cores: frozenset[int] | None = None


def shares(count: int) -> list[Share]:
    """Equal parts of the GPUs that this process sees, or where there are none of the cores that it may use.

    UserError if there are not enough.
    """
    if count == 1:
        return [Share()]
    gpus = torch.cuda.device_count()
    if gpus:
        if gpus % count:
            raise UserError(f"parallel={count}: {gpus} GPUs are no {count} equal shares; let parallel divide {gpus}")
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = named.split(",") if named else [str(i) for i in range(gpus)]
        size = gpus // count
        return [Share(gpus=",".join(names[i * size : (i + 1) * size])) for i in range(count)]
    if sys.platform != "linux":
        return [Share()] * count
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise UserError(f"parallel={count}: there are {len(cores)} CPU cores, and no GPU; a point needs one at least")
    edges = [i * len(cores) // count for i in range(count + 1)]
    return [Share(cores=frozenset(cores[a:b])) for a, b in pairwise(edges)]


class Local(Launcher):
    """On this machine.

    parallel: points at the same time, each with its share of the GPUs (of the CPU cores where there is none). What
    they print goes to a file each then, <what the point writes>.log.

    A point has a process group of its own: it gets each signal once, from the sweep, whoever sent it. SIGTERM when the
    sweep is killed.
    """

    lives_on = False
    seconds = 0.05

    def __init__(self, parallel: int = 1):
        if parallel < 1:
            raise ValueError(f"parallel must be positive, not {parallel}")
        self.at_once = parallel
        self.places: list[tuple[Share, subprocess.Popen | None]] = [(share, None) for share in shares(parallel)]

    def start(self, verb: str, point: Point, job: str | None, held: int) -> Started:
        free = next(i for i, (_, process) in enumerate(self.places) if process is None or process.poll() is not None)
        share = self.places[free][0]
        log = Path(f"{point.place.out}.log") if self.at_once > 1 else None
        process = start([*COMMAND, verb, *point.overrides], held, share, log)
        self.places[free] = (share, process)
        return LocalPoint(process, log)


def start(command: Sequence[str], held: int, share: Share, log: Path | None) -> subprocess.Popen:
    """log: where it prints, after what earlier starts printed there; None: here. UserError if it cannot be written."""
    parent = os.getpid()

    def before_exec() -> None:
        if share.cores is not None:
            os.sched_setaffinity(0, share.cores)
        if sys.platform == "linux":  # it ends with its parent
            ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(128 + signal.SIGTERM)

    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": share.gpus} if share.gpus is not None else {})}
    with _opened(log) as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            process_group=0,
            preexec_fn=before_exec,
            pass_fds=(held,),
        )


def _opened(log: Path | None) -> AbstractContextManager[BinaryIO | None]:
    if log is None:
        return nullcontext()
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("ab")
    except OSError as error:
        raise UserError(f"{log}, for what the point prints, cannot be written ({error})") from error
