"""diffusion-trainer <verb> -m key=a,b: every combination of the swept values, each in a process tree of its own.

`plan` expands and checks, `run` runs one point after the other, `table` gathers their metrics: a launcher for a
cluster replaces `run` alone.
"""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from diffusion_trainer.apps import processes
from diffusion_trainer.apps.config import assignment, expand
from diffusion_trainer.apps.places import PLACES, Place
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole

COMMAND = (sys.executable, "-m", "diffusion_trainer")
Check = Callable[[Sequence[str]], object]  # of overrides


@dataclass(frozen=True)
class Point:
    """One combination."""

    swept: tuple[str, ...]  # key=value
    overrides: tuple[str, ...]  # all of them, those that say where to write last
    place: Place

    @property
    def title(self) -> str:
        return " ".join(self.swept)


def main(verb: str, show: Callable[[Sequence[str]], str], overrides: Sequence[str], check: Check | None = None) -> int:
    """The exit code: 0, or that of the first point that failed, or 128 + the signal that stopped the sweep."""
    if verb not in PLACES:
        raise UserError(f"{verb} does not sweep; {', '.join(PLACES)} do")
    world = processes.current()
    if world and world.size > 1:
        raise UserError(f"{world.size} processes were started; start a sweep once, it starts each point's processes")
    points = plan(verb, show, overrides, check)
    codes, stopped = run(verb, points)
    print(f"\n{summary(points, codes)}")
    if points[0].place.report:
        print("\n" + table(points, codes))
    return 128 + stopped if stopped else next((code for code in codes if code), 0)


def plan(
    verb: str, show: Callable[[Sequence[str]], str], overrides: Sequence[str], check: Check | None = None
) -> list[Point]:
    """The points, each with a place of its own; UserError lists what is wrong with any of them, and with which.

    show: the verb's own, from overrides to the YAML of the checked configuration. check: the verb's own; UserError for
    all that it can know to fail before it touches a device, so that no point fails for that after hours of others.
    """
    points, wrong, combinations = [], {}, expand(overrides)
    for texts, swept in combinations:
        try:
            place = PLACES[verb](yaml.safe_load(show(texts)), swept)
            own = (assignment(key, text) for key, text in place.settings.items())
            point = Point(tuple(swept), (*texts, *own), place)
            if check:
                check(point.overrides)
        except UserError as error:
            wrong.setdefault(str(error), []).append(" ".join(swept))
        else:
            points.append(point)
    if wrong:  # what is wrong with all of them is said once
        at = {e: "every point" if len(where) == len(combinations) else "; ".join(where) for e, where in wrong.items()}
        raise UserError("nothing was started\n" + "\n".join(f"{where}:\n{error}" for error, where in at.items()))
    _check_places(points)
    return points


def _check_places(points: Sequence[Point]) -> None:
    owners: dict[Path, Point] = {}
    for point in points:
        other = owners.setdefault(point.place.out.absolute(), point)
        if other is not point:
            both = f"{other.title} and {point.title}"
            raise UserError(f"{both} would both write to {point.place.out}; leave the choice of the place to -m")


def run(verb: str, points: Sequence[Point], command: Sequence[str] = COMMAND) -> tuple[list[int], int]:
    """Exit codes of the points that ran, in order, and the signal that stopped the sweep (0: none did).

    A point has a process group of its own: it gets each signal once, from here, whoever sent it.
    """
    codes, received, running = [], [], []

    def forward(number: int, frame) -> None:
        received.append(number)
        for process in running:
            process.send_signal(number)

    taken = (s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN)
    previous = {s: signal.signal(s, forward) for s in taken}
    try:
        for i, point in enumerate(points):
            if received:
                break
            print(f"[{i + 1}/{len(points)}] {point.title}", flush=True)
            arguments = [*command, verb, *point.overrides]
            running[:] = [subprocess.Popen(arguments, stdin=subprocess.DEVNULL, process_group=0)]
            if received:  # it came while the point was being started
                running[0].send_signal(received[-1])
            code = running[0].wait()
            codes.append(code if code >= 0 else 128 - code)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return codes, received[0] if received else 0


def summary(points: Sequence[Point], codes: Sequence[int]) -> str:
    """How many points are done, and what became of the others."""
    lines = [f"{codes.count(0)} of {len(points)} points are done"]
    for i, point in enumerate(points):
        if i >= len(codes) or codes[i]:
            why = f"failed with exit code {codes[i]}" if i < len(codes) else "was not started"
            lines.append(f"  [{i + 1}/{len(points)}] {point.title} {why}")
    return "\n".join(lines)


def table(points: Sequence[Point], codes: Sequence[int]) -> str:
    """The points' swept values and metrics, aligned; the same in table.csv. A point that failed has no metrics."""
    rows = [dict(o.lstrip("+").split("=", 1) for o in point.swept) for point in points]
    for row, point, code in zip(rows, points, codes, strict=False):
        if code == 0 and point.place.report.is_file():
            row.update(json.loads(point.place.report.read_text())["metrics"])
    names = list(dict.fromkeys(name for row in rows for name in row))
    path = Path(os.path.relpath(os.path.commonpath([point.place.home.absolute() for point in points]))) / "table.csv"
    try:
        with whole(path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); the points' own files are whole") from error
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)) for line in cells]
    return "\n".join([*lines, f"written to {path}"])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
