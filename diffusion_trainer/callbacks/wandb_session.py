"""One session with Weights & Biases: what it is told, and that it is told once."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from PIL.Image import Image

from diffusion_trainer.callbacks.csv_logger import read_rows
from diffusion_trainer.callbacks.wandb_files import Point, leave_out, points, points_of, received, records
from diffusion_trainer.conventions import PassingError
from diffusion_trainer.evaluation import pictures
from diffusion_trainer.streaming.locks import locked

ONLINE, OFFLINE = "online", "offline"


class Session:
    """Online, it tells what the server lacks, whoever was to send that; else what no record in the folder has."""

    def __init__(self, folder: Path, mode: str, begin: Callable[[str], Any]):
        """begin: makes the wandb.Run, in a mode."""
        self.folder, self.online = folder, mode == ONLINE
        self._before = records(folder)
        self.run = begin(mode)
        # `step=` is not ours to say: `wandb sync` adds that of the rows to where the server is.
        if not self.online:
            self._known = points(folder)
            return
        self._known, unknown = received(folder, self.run.starting_step)
        if unknown < self.run.starting_step:
            try:
                self._known |= _asked(self.run, unknown)
            except PassingError:
                self.run.finish()
                raise

    def catch_up(self, reached: int) -> int:
        """Tells what it should have of metrics.csv and samples/ up to `reached` images; the number of rows. What is
        later was logged by steps that are lost, and is yet to come again.
        """
        rows: dict[int, dict[str, Any]] = {}
        for at, file in pictures.of_evaluations(self.folder):
            if (at, pictures.METRIC) not in self._known and pictures.readable(file):
                rows.setdefault(at, {})[pictures.METRIC] = file
        path = self.folder / "metrics.csv"
        for row in read_rows(path) if path.is_file() else []:
            numbers = {key: float(value) for key, value in row.items() if value and key != "images_seen"}
            rows.setdefault(int(row["images_seen"]), {}).update(numbers)
        return sum(self.log({"images_seen": at, **rows[at]}) for at in sorted(rows) if at <= reached)

    def leave_out(self) -> None:
        """The sessions before: this one has told, or tells, what is in them."""
        leave_out(self._before)

    def log(self, row: Mapping[str, Any]) -> bool:
        """Whether there was anything new in it. A picture is one, or its file."""
        at = row["images_seen"]
        new = {k: _told(v) for k, v in row.items() if k != "images_seen" and (at, k) not in self._known}
        if new:
            self.run.log({"images_seen": at, **new})
            self._known |= {(at, k) for k in new}
        return bool(new)


@contextmanager
def alone(folder: Path, seconds: float) -> Iterator[None]:
    """Of the run's sessions the only one that talks to the server: two would write over each other's rows.

    PassingError if another one does, and is not done in so many seconds.
    """
    (folder / "wandb").mkdir(exist_ok=True)
    end = time.monotonic() + seconds
    while True:
        with locked(folder / "wandb" / ".lock", wait=False) as mine:
            if mine is not None:
                yield
                return
        if time.monotonic() >= end:
            raise PassingError(f"another process is sending {folder}, `wandb-sync` maybe")
        time.sleep(0.1)


def rows_there(run: Any) -> int:
    """How many rows of a wandb.Run its server says that it has."""
    with _asking():
        return wandb.Api().run(run.path).historyLineCount or 0


def _asked(run: Any, since: int) -> set[Point]:
    """What is in its server's rows from `since` on; PassingError if it does not tell all of them."""
    with _asking():
        rows = {row["_step"]: row for row in wandb.Api().run(run.path).scan_history(min_step=since, use_cache=False)}
    missing = sum(at not in rows for at in range(since, run.starting_step))
    if missing:
        raise PassingError(
            f"{missing:,} of the {run.starting_step:,} rows that the server has are neither in wandb/ nor told by it, "
            "and might be sent twice"
        )
    return {point for row in rows.values() for point in points_of(row)}


@contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # wandb.Error, and others of wandb's that are none
        raise PassingError(f"the server does not tell what it has ({error})") from error


def _told(value: Any) -> Any:
    return wandb.Image(str(value) if isinstance(value, Path) else value) if isinstance(value, Image | Path) else value
