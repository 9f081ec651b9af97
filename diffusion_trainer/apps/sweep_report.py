"""diffusion-trainer sweep-report: the table of a sweep, at any moment."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.jobs import Slurm
from diffusion_trainer.apps.nodes import Schema
from diffusion_trainer.apps.sweep_record import DONE, FAILED, PRUNED, RUNNING, STOPPED, WAITING, Entry, Record, is_held
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole

TABLE = "table.csv"
Row = dict[str, Any]


class ReportConfig(Schema):
    sweep: str
    sort: str | None
    direction: Literal["minimize", "maximize"] | None
    out: str | None


def show(overrides: Sequence[str]) -> str:
    return configuration.dump(_load(overrides))


def _load(overrides: Sequence[str]) -> dict:
    return configuration.load("sweep-report", overrides, ReportConfig)


def main(overrides: Sequence[str]) -> int:
    config = _load(overrides)
    record = Record.read(Path(config["sweep"]))
    print(
        f"{record.verb} -m in {record.folder}: {_counts(record)}\n\n"
        + table(record, config["sort"], config["direction"], Path(config["out"]) if config["out"] else None)
    )
    return 0


def summary(record: Record, count: int) -> str:
    """How many points are done, and what became of the others."""
    lines = [f"{sum(e.state == DONE for e in record.entries)} of {count} points are done"]
    for i, entry in enumerate(record.entries, 1):
        if entry.state != DONE:
            lines.append(f"  [{i}/{count}] {' '.join(entry.swept)} {_says(entry)}")
    jobs = [entry.job for entry in record.entries if entry.state == RUNNING and entry.job]
    if jobs:
        lines.append(f"the same command goes on watching them; scancel {' '.join(jobs)} ends them")
    return "\n".join(lines)


def _says(entry: Entry) -> str:
    words = {
        WAITING: "was not started",
        RUNNING: f"goes on as job {entry.job}",
        FAILED: f"failed with exit code {entry.code}",
        STOPPED: "was stopped; the same command goes on with it",
        PRUNED: "was worse than others at the same images, and stopped",
    }
    return words[entry.state]


def table(record: Record, sort: str | None = None, direction: str | None = None, out: Path | None = None) -> str:
    """The points' swept values, states and metrics, aligned; the same as CSV in <sweep>/table.csv, or `out`.

    sort: a metric, or a swept key; the best first, points without it last. UserError if no point has it.
    """
    sort, direction = sort or record.metric, direction or record.direction or "minimize"
    alive = is_held(record.folder)
    rows = [{**e.values(), "state": _state(e, alive), **e.metrics(record.folder)} for e in record.entries]
    names = list(dict.fromkeys(name for row in rows for name in (*_keys(record), *row)))
    if sort:
        rows = _sorted(rows, sort, direction, names)
    path = out or record.folder / TABLE
    _write(path, names, rows)
    best = [f"best {sort}: {_best(rows[0], sort, record)}"] if sort and rows and sort in rows[0] else []
    return "\n".join([*_aligned(names, rows), *best, f"written to {path}"])


def _keys(record: Record) -> list[str]:
    return [*dict.fromkeys(key for entry in record.entries for key in entry.values()), "state"]


def _state(entry: Entry, alive: bool) -> str:
    """A point that was running when its sweep was killed has stopped, unless it is a job."""
    if entry.state != RUNNING or alive:
        return entry.state
    if entry.job is None:
        return STOPPED
    try:
        return f"job {entry.job} {Slurm().state(entry.job).lower()}"
    except UserError:  # no SLURM here: another machine has submitted it
        return f"job {entry.job}"


def _counts(record: Record) -> str:
    alive = is_held(record.folder)
    states = [_state(entry, alive) for entry in record.entries]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _sorted(rows: list[Row], sort: str, direction: str, names: Sequence[str]) -> list[Row]:
    if sort not in names and any(row["state"] == DONE for row in rows):
        raise UserError(f"sort={sort}: no point has it; there is {', '.join(names)}")
    sign = -1 if direction == "maximize" else 1
    return sorted(rows, key=lambda row: sign * value if (value := _number(row.get(sort))) == value else math.inf)


def _number(value: object) -> float:
    """NaN where it is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _best(row: Row, sort: str, record: Record) -> str:
    return f"{_cell(row[sort])} with {' '.join(f'{key}={row[key]}' for key in _keys(record)[:-1] if key in row)}"


def _write(path: Path, names: Sequence[str], rows: Sequence[Row]) -> None:
    try:
        with whole(path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); the points' own files are whole") from error


def _aligned(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.rjust, line, widths)) for line in cells]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
