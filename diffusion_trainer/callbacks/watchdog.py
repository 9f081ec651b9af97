"""A thread that ends a process which makes no progress, once its stacks are written down."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from math import inf
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import IO, NamedTuple

from diffusion_trainer.callbacks.last_words import HANG, SUSPENDED, RankFiles, State, write_failure, write_state

HUNG = 76  # exit code: nothing moved for as long as the time-out allows; to be started again
LOOK_SECONDS = 1.0  # between two looks
LINGER_SECONDS = 2.0  # between a rank's stacks and its end: its peers, which wait for it, write theirs meanwhile
LOCKED_SECONDS = 5.0  # after the time-out: Python itself does not run, its threads neither
ANSWER_SECONDS = 4.0  # after SIGTERM, which SIGKILL may follow: SLURM's KillWait is 30 s by default, and seldom below 5


class Beat(NamedTuple):
    """A sign of life."""

    at: float  # time.monotonic
    doing: str
    allowed_seconds: float  # until the next


class Signals:
    """Those that have reached this process, also where its main thread never comes back to Python to handle them.

    To be made, and closed, in the main thread. A forked child shares them until it calls signal.set_wakeup_fd(-1).
    """

    def __init__(self):
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def came(self) -> set[int]:
        """Since this was last asked: of those with a handler in Python."""
        try:
            return set(os.read(self._read, 65536))
        except BlockingIOError:
            return set()

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous)
        os.close(self._read)
        os.close(self._write)


class Watchdog:
    """Ends this process with exit code 76 when no beat comes for as long as the last one allows.

    It writes the stacks of all threads and, by SIGQUIT, of the worker processes to <logs>/stacks-rank-<r>.txt, the last
    words to failed-rank-<r>.txt, kills the workers and ends the process, also from within a call that never returns. If
    something holds Python's lock for ever, a thread without Python writes the stacks and ends it, with exit code 1.
    SIGQUIT from outside writes the stacks, too, and training goes on. So does SIGTERM, once, if no beat follows it: a
    rank may wait for one that hung, and be ended for that. Where it ends in order what was written from then on is
    taken back. How far the process has come is written once a second, if that has changed. An error on the way to a
    file is told once; the watch goes on.

    A process that was suspended for longer than the time-out counts as hung.

    progress: steps taken and images seen, asked from the thread.
    """

    def __init__(self, files: RankFiles, world: int, progress: Callable[[], tuple[int, int]]):
        self.files, self.world, self.progress = files, world, progress
        self.host = socket.gethostname()
        self._last = Beat(time.monotonic(), "the start", inf)
        self._told = -inf  # when SIGTERM came
        self._wanted: int | None = None  # bytes of the stacks' file without those written because of it
        self._written: Beat | None = None
        self._told_unwritten = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self, allowed_seconds: float) -> None:
        self.beat("the start", allowed_seconds)
        self.files.logs.mkdir(parents=True, exist_ok=True)
        self._file = self._opened()
        faulthandler.unregister(signal.SIGQUIT)  # a registration of another's would stand in the way of ours
        # Told to our thread: a look at stacks of threads that run meanwhile, as faulthandler's is, may end the process.
        self._previous = signal.signal(signal.SIGQUIT, lambda number, frame: None)
        signal.siginterrupt(signal.SIGQUIT, False)
        os.register_at_fork(after_in_child=self._in_child)
        self._arm(allowed_seconds)
        self._signals = Signals()
        self._thread.start()

    def stop(self, well: bool) -> None:
        """well: the process has not failed, and nobody will ask how far it had come."""
        self._stopped.set()
        self._thread.join()
        self._signals.close()
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGQUIT, self._previous or signal.SIG_DFL)  # None: a handler that Python does not know
        self._file.close()
        self._tidy(well)
        if well:
            self.files.state.unlink(missing_ok=True)
        else:
            self._written = None  # a step may have ended since the last beat
            self._tell_state()

    def _tidy(self, well: bool) -> None:
        stacks = self.files.stacks
        if well and self._wanted is not None and self._file.name == str(stacks):
            with suppress(OSError):  # they stay, then
                os.truncate(stacks, self._wanted)
        if stacks.is_file() and stacks.stat().st_size == 0:
            stacks.unlink()

    def _in_child(self) -> None:
        """A forked worker writes the stack of its main thread into this file when it is sent SIGQUIT; what it is told
        is not its rank's to answer."""
        if not self._stopped.is_set():
            signal.set_wakeup_fd(-1)
            faulthandler.register(signal.SIGQUIT, self._file, all_threads=False)

    def _opened(self) -> IO:
        try:
            return self.files.stacks.open("a")
        except OSError as error:
            self._say(
                f"WARNING: {self.files.stacks} cannot be written ({error.strerror}): stacks would be printed here"
            )
            return os.fdopen(os.dup(2), "a")

    def beat(self, doing: str, allowed_seconds: float) -> None:
        self._last = Beat(time.monotonic(), doing, allowed_seconds)

    def state(self) -> State:
        last = self._last
        at, files = time.time() - (time.monotonic() - last.at), self.files
        return State(files.rank, self.world, self.host, os.getpid(), last.doing, *self.progress(), at, files.attempt)

    def _watch(self) -> None:
        now, last, still = time.monotonic(), self._last, 0.0
        while True:
            before, now = now, time.monotonic()
            left = last.allowed_seconds - (now - last.at)
            if left <= 0:
                self._end(last, still)
            self._tell_state()
            self._look_at_signals(before, now)
            writing = time.monotonic() - now  # to a file system that may be slow
            self._arm(left)
            if self._stopped.wait(min(LOOK_SECONDS, left)):
                return
            latest, then = self._last, time.monotonic()
            waited = min(then - now - writing, then - latest.at)  # since the beat at most
            still = (still if latest is last else 0.0) + (waited if waited > LOOK_SECONDS + 1 else 0.0)
            last = latest

    def _arm(self, left: float) -> None:
        faulthandler.dump_traceback_later(left + LOCKED_SECONDS, exit=True, file=self._file)

    def _look_at_signals(self, before: float, now: float) -> None:
        """before, now: when they were last looked at, and are."""
        came = self._signals.came()
        if signal.SIGQUIT in came:
            self._try_to_write_stacks("asked for by SIGQUIT")
        if signal.SIGTERM in came and self._told < self._last.at:
            self._told = before if self._last.at < before else now  # a beat in between may have been the answer
        waited = now - self._told
        if self._told <= self._last.at or waited < ANSWER_SECONDS:
            return
        with suppress(OSError):
            self._wanted = os.fstat(self._file.fileno()).st_size
        self._try_to_write_stacks(f"no sign of life in the {waited:.0f} s since SIGTERM")
        self._told = inf  # once is enough

    def _tell_state(self) -> None:
        if self._written == self._last:
            return
        self._written = self._last
        try:
            write_state(self.files, self.state())
        except OSError as error:
            if not self._told_unwritten:
                self._say(f"{self.files.state} cannot be written: {error}")
            self._told_unwritten = True

    def _end(self, last: Beat, still: float) -> None:
        """Last words first: they are short, and a full disk or a dead file system may stop what comes after. still: how
        long this thread has waited for its next looks, those aside that came about when they were due.
        """
        idle = time.monotonic() - last.at
        suspended = f", {SUSPENDED} {still:.0f} s of them" if still > idle / 2 else ""
        what = f"{HANG} {idle:.0f} s{suspended}; all stacks are in {self.files.stacks}"
        main = sys._current_frames()[threading.main_thread().ident]
        try:
            self._written = None
            self._tell_state()
            write_failure(self.files, self.state(), what, traceback.format_stack(main))
            self._write_stacks(what)
            time.sleep(LINGER_SECONDS)
        except OSError as error:
            self._say(f"the stacks cannot be written: {error}")
        finally:
            self._say(f"{what}. It ends here with exit code {HUNG}")
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(HUNG)

    def _try_to_write_stacks(self, what: str) -> None:
        try:
            self._write_stacks(what)
        except OSError as error:
            self._say(f"the stacks cannot be written: {error}")

    def _write_stacks(self, what: str) -> None:
        workers = [w.pid for w in multiprocessing.active_children() if isinstance(w, ForkProcess)]
        children = "".join(f"  worker process {pid}: {_kernel_state(pid)}\n" for pid in workers)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(self._file.fileno(), f"\n{now}: {self.state()}:\n{what}\n{children}".encode())
        faulthandler.dump_traceback(self._file, all_threads=True)
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)

    def _say(self, text: str) -> None:
        # Not print: the thread that hangs may hold the lock of the stream.
        os.write(2, f"rank {self.files.rank} of {self.world} on {self.host}: {text}\n".encode())


def _kernel_state(pid: int) -> str:
    """As Linux names it: S (sleeping), T (stopped), D (disk sleep), Z (zombie)."""
    status = Path(f"/proc/{pid}/status")
    if not status.is_file():
        return "unknown"
    return next(line.split(None, 1)[1].strip() for line in status.read_text().splitlines() if line.startswith("State:"))
