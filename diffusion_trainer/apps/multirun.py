"""diffusion-trainer <verb> -m key=a,b: every combination of the swept values, each in a process tree of its own.

A sweeper says which points there are, a launcher runs them, sweep.json in the sweep's folder knows what has become of
each: the same command again goes on where it was. A sweep has keys of its own (conf/sweep.yaml) among the verb's.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import processes
from diffusion_trainer.apps.keys import AS_JOBS, OF_SWEEPS, check_chosen
from diffusion_trainer.apps.launchers import Launcher, Started
from diffusion_trainer.apps.nodes import Schema, build
from diffusion_trainer.apps.places import PLACES, Point
from diffusion_trainer.apps.planning import Check, Show, plan
from diffusion_trainer.apps.sweep_record import DONE, PRUNED, RUNNING, STOPPED, Record, held
from diffusion_trainer.apps.sweep_report import summary, table
from diffusion_trainer.apps.sweepers import Course
from diffusion_trainer.conventions import UserError

__all__ = ["main", "plan"]
DEFAULT = {"sweeper": "grid", "hydra/launcher": "local"}  # of conf/sweep.yaml
INSIDE = ("sweeper.", "runner.")
SHOWN = 20  # lines of the log of a point that failed
GROUP = "WANDB_RUN_GROUP"  # Weights & Biases shows runs with the same one together


class SweepConfig(Schema):
    sweeper: dict
    runner: dict


def main(verb: str, show: Show, overrides: Sequence[str], check: Check | None = None) -> int:
    """The exit code: 0, or that of the first point that failed, or 128 + the signal that stopped the sweep."""
    if verb not in PLACES:
        raise UserError(f"{verb} does not sweep; {', '.join(PLACES)} do; {AS_JOBS}")
    world = processes.current()
    if world and world.size > 1:
        raise UserError(f"{world.size} processes were started; start a sweep once, it starts each point's processes")
    own, others = split(overrides)
    config = configuration.load("sweep", own, SweepConfig)
    sweeper, launcher = (build(config[name], name) for name in ("sweeper", "runner"))
    course = sweeper.course(launcher.planner(verb, show, check), others)
    with held(course.home) as lock, grouped(course.home.absolute().name):
        record = Record(course.home, verb, course.study, course.metric, course.direction)
        record.begin(course.known)
        sweep = Sweep(verb, course, launcher, record, lock)
        stopped = sweep.run()
        print(f"\n{summary(record, course.count)}")
        if any(entry.report for entry in record.entries):
            print("\n" + table(record))
    return 128 + stopped if stopped else next((code for code in sweep.codes if code), 0)


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sweep's own overrides, as conf/sweep.yaml has them, and the verb's."""
    own, others, given = [], [], {}
    for text in overrides:
        key, _, value = text.partition("=")
        if key in OF_SWEEPS or key.startswith(INSIDE):
            own.append(f"{OF_SWEEPS.get(key, key)}={value}")
            given[own[-1].split("=")[0]] = text
        else:
            others.append(text)
    for name, default in DEFAULT.items():
        group = OF_SWEEPS[name]
        chosen = given.get(group, f"{name}={default}").partition("=")[2]
        inside = {key.removeprefix(f"{group}."): text for key, text in given.items() if key.startswith(f"{group}.")}
        check_chosen(name, chosen, inside)
    return own, others


@contextmanager
def grouped(name: str) -> Iterator[None]:
    """The points, whose processes inherit it, are one group in Weights & Biases, unless it has a name already."""
    before = os.environ.get(GROUP)
    os.environ[GROUP] = before or name
    try:
        yield
    finally:
        os.environ.pop(GROUP)
        if before is not None:
            os.environ[GROUP] = before


@dataclass
class Live:
    point: Point
    started: Started
    worse: bool = False  # than others
    pruned: bool = False  # and was told so


def ended(live: Live, code: int) -> str:
    """In words, of a point whose log nobody has seen; with the end of the log if it failed."""
    if not code:
        return f"{live.point.title} has ended"
    log = live.started.log
    lines = log.read_text(errors="replace").splitlines()[-SHOWN:] if log.is_file() else ["(removed)"]
    return "\n  ".join([f"{live.point.title} has ended with exit code {code}; {log} ends:", *lines])


@dataclass
class Sweep:
    """The points of a course on their way; `codes` are those of the points that ended, in that order."""

    verb: str
    course: Course
    launcher: Launcher
    record: Record
    lock: int  # see sweep_record.held
    live: list[Live] = field(default_factory=list)
    received: list[int] = field(default_factory=list)  # signals
    codes: list[int] = field(default_factory=list)

    def run(self) -> int:
        """The signal that stopped the sweep; 0: none did."""
        taken = (s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN)
        previous = {s: signal.signal(s, self._forward) for s in taken}
        try:
            points = self.course.points()
            while (self._fill(points) or self.live) and not (self.received and self.launcher.lives_on):
                self._look()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.received[0] if self.received else 0

    def _forward(self, number: int, frame) -> None:
        self.received.append(number)
        for live in self.live:
            live.started.stop(number)

    def _fill(self, points: Iterator[Point]) -> bool:
        """Starts as many as there is room for; whether there may be more."""
        room = self.launcher.at_once or self.course.at_once
        while not self.received and len(self.live) < room:
            point = next(points, None)
            if point is None:
                return False
            self._start(point)
        return not self.received

    def _start(self, point: Point) -> None:
        entry = self.record.entry(point)
        title = f"[{self.record.entries.index(entry) + 1}/{self.course.count}] {point.title}"
        if self.record.is_done(point):
            print(f"{title} is done already", flush=True)
            self._note_end(point, 0, entry.job)
            return
        print(title, flush=True)
        cancelled = entry.job if entry.state == PRUNED else None  # by a sweep that was killed before it ended
        self.record.note(point, RUNNING, job=entry.job)
        try:
            started = self.launcher.start(self.verb, point, entry.job, self.lock)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            if self.launcher.lives_on:  # the controller may be busy, and a job of this point in its queue
                self.record.note(point, STOPPED, 2, entry.job)
                self.codes.append(2)
            else:
                self._note_end(point, 2, entry.job)
            return
        self.live.append(Live(point, started, pruned=cancelled is not None and started.job == cancelled))
        if self.received:  # it came while the point was being started
            started.stop(self.received[-1])
        if started.job:
            self.record.note(point, RUNNING, job=started.job)

    def _look(self) -> None:
        """Waits a moment, then sees to the points that have ended, and to those that need not."""
        time.sleep(self.launcher.seconds if self.live else 0)
        for live in list(self.live):
            code = live.started.code()
            if code is not None:
                self.live.remove(live)
                self._end(live, code)
            elif not live.pruned and not self.received and (live.worse or self.course.is_worse(live.point)):
                live.worse, live.pruned = True, live.started.prune()
                if live.pruned:
                    self.record.note(live.point, PRUNED, job=live.started.job)
                    print(f"{live.point.title} is worse than others at the same images; it is stopped", flush=True)

    def _end(self, live: Live, code: int) -> None:
        if live.started.log:
            print(ended(live, code), flush=True)
        if self.received and code:
            self.record.note(live.point, STOPPED, code, live.started.job)
            self.codes.append(code)
        else:
            self._note_end(live.point, code, live.started.job, live.pruned)

    def _note_end(self, point: Point, code: int, job: str | None, pruned: bool = False) -> None:
        state = self.course.ended(point, code, pruned)
        self.record.note(point, state, code, job)
        self.codes.append(0 if state in (DONE, PRUNED) else code)
