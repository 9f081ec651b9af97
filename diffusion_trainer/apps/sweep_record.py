"""sweep.json: what a sweep planned and what became of it, so that the same command goes on and others can look."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_trainer.apps.folder import SWEEP as FILE
from diffusion_trainer.apps.folder_lock import is_locked, taken
from diffusion_trainer.apps.places import Point
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole

WAITING, RUNNING, DONE, FAILED, STOPPED, PRUNED = "not started", "running", "done", "failed", "stopped", "pruned"
ALONE, POINTS = ".sweep.lock", ".points.lock"


@dataclass
class Entry:
    """What is known of one point."""

    swept: list[str]  # key=value
    out: str  # the file or folder that it writes, from the sweep's folder
    report: str | None  # the JSON file with its metrics, from there too
    key: str = ""  # of the configuration (places.Point) that `state` is about
    state: str = WAITING
    code: int | None = None  # the exit code of its last start
    job: str | None = None  # of SLURM
    study: str = ""  # of a search (searching.py)

    def values(self) -> dict[str, str]:
        return dict(o.lstrip("+").split("=", 1) for o in self.swept)

    def metrics(self, folder: Path, ended: bool = False) -> dict[str, Any]:
        """Of a point that is done or pruned, or whose job has ended since; what a point that failed left is of an
        earlier time.
        """
        path = folder / self.report if self.report else None
        if not (ended or self.state in (DONE, PRUNED)) or path is None or not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text())["metrics"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(
                f"WARNING: {path} has no metrics that can be read ({error!r}): the point is shown without",
                file=sys.stderr,
            )
            return {}


class Record:
    """The file and its entries: those of this plan in order, and those of earlier plans in the same folder.

    study: of a search, whose earlier points are this one's too. metric, direction: what it looks for.
    """

    def __init__(
        self, folder: Path, verb: str, study: str = "", metric: str | None = None, direction: str | None = None
    ):
        self.folder, self.verb, self.study, self.metric, self.direction = folder, verb, study, metric, direction
        self.entries: list[Entry] = []
        self.others: list[Entry] = []

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """UserError if there is none, or it cannot be read."""
        path = folder / FILE
        try:
            text = json.loads(path.read_text())
            record = cls(folder, **{name: text[name] for name in ("verb", "study", "metric", "direction")})
            record.entries, record.others = ([Entry(**e) for e in text[name]] for name in ("points", "others"))
            for entry in (*record.entries, *record.others):
                entry.values()
            return record
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"there is no {path}: give the folder of a sweep, where its table.csv is") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error}); remove it, and the sweep makes another") from error

    def begin(self, points: Sequence[Point]) -> None:
        """With what an earlier plan in the folder knew of these points; UserError if it cannot be written."""
        if (self.folder / FILE).is_file():
            known = Record.read(self.folder)
            earlier = [*known.entries, *known.others]
            self.entries = [e for e in earlier if self.study and e.study == self.study]
            self.others = [e for e in earlier if e not in self.entries]
        for point in points:
            self.entry(point)
        try:
            self._write()
        except OSError as error:
            raise UserError(f"{self.folder / FILE} cannot be written ({error}); nothing was started") from error

    def entry(self, point: Point) -> Entry:
        """The point's own; a new one is as an earlier plan left it, or not started."""
        out = self._relative(point.place.out)
        for entry in self.entries:
            if entry.out == out:
                return entry
        known = next((e for e in self.others if e.out == out), None)
        if known is None:
            report = point.place.report
            known = Entry(list(point.swept), out, self._relative(report) if report else None)
        known.study = self.study
        self.others = [e for e in self.others if e is not known]
        self.entries.append(known)
        return known

    def note(self, point: Point, state: str, code: int | None = None, job: str | None = None) -> None:
        """What has become of a point; on the disk at once."""
        entry = self.entry(point)
        entry.swept, entry.key, entry.state, entry.code, entry.job = list(point.swept), point.key, state, code, job
        try:
            self._write()
        except OSError as error:  # only a record: what it misses is looked for in the points' folders, or done again
            print(f"WARNING: {self.folder / FILE} cannot be written ({error})", file=sys.stderr, flush=True)

    def is_done(self, point: Point) -> bool:
        """Whether there is nothing left to do for it."""
        if point.place.complete is not None:
            return point.place.complete(point.config)
        entry = self.entry(point)
        return entry.state == DONE and entry.key == point.key and point.place.stands()

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path.absolute(), self.folder.absolute())

    def _write(self) -> None:
        text = {
            **{name: getattr(self, name) for name in ("verb", "study", "metric", "direction")},
            "points": [asdict(e) for e in self.entries],
            "others": [asdict(e) for e in self.others],
        }
        with whole(self.folder / FILE) as part:
            part.write_text(json.dumps(text, indent=1) + "\n")


def is_held(folder: Path) -> bool:
    """Whether a sweep runs in the folder now."""
    return is_locked(folder / ALONE)


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """The sweep's folder, ours alone; UserError if another sweep runs there. Points of one that was killed have ended.

    Yields a descriptor: while a process that inherited it lives, the next sweep waits for that process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        alone, points = ((folder / name).open("w") for name in (ALONE, POINTS))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); nothing was started") from error
    with alone, points:
        if not taken(alone):
            raise UserError(
                f"another process is running a sweep in {folder}; wait for it, or see how far it is: "
                f"diffusion-trainer sweep-report sweep={folder}"
            )
        if not taken(points):
            print(f"a point of the sweep that was killed in {folder} is stopping; waiting for it", flush=True)
            while not taken(points):
                time.sleep(0.1)
        yield points.fileno()
