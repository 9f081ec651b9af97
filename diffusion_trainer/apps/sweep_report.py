"""diffusion-trainer sweep-report: the table of a sweep, at any moment."""

import csv
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.jobs import GONE, Slurm
from diffusion_trainer.apps.nodes import Schema
from diffusion_trainer.apps.sweep_record import DONE, FAILED, PRUNED, RUNNING, STOPPED, WAITING, Entry, Record, is_held
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole

TABLE = "table.csv"
ENDED = (" completed", f" {GONE.lower()}")  # a job's state in words, whose last metrics may be there
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
    if config["sweep"] == "???":
        raise UserError("sweep is missing: say sweep=runs/<name>, the folder of a sweep")
    record = Record.read(Path(config["sweep"]))
    states = _states(record)
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    out = Path(config["out"]) if config["out"] else None
    shown = _table(record, states, config["sort"], config["direction"], out)
    print(f"{record.verb} -m in {record.folder}: {counts}\n\n{shown}")
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


def table(record: Record) -> str:
    """The points' swept values, states and metrics, aligned, and the best point of a search; the same as CSV in
    <sweep>/table.csv, if that can be written.
    """
    return _table(record, _states(record))


def _table(
    record: Record,
    states: Sequence[str],
    sort: str | None = None,
    direction: str | None = None,
    out: Path | None = None,
) -> str:
    """As above. sort: a metric, or a swept key; the best first, points without it last. out: of the CSV.

    UserError if no point has what is sorted by, or `out` cannot be written.
    """
    sort, direction = sort or record.metric, direction or record.direction or "minimize"
    rows = [
        {**entry.values(), "state": state, **entry.metrics(record.folder, ended=state.endswith(ENDED))}
        for entry, state in zip(record.entries, states, strict=True)
    ]
    names = list(dict.fromkeys(name for row in rows for name in (*_keys(record), *row)))
    if sort:
        rows = _sorted(rows, sort, direction, names)
    best = [f"best {sort}: {_best(rows[0], sort, record)}"] if sort and rows and sort in rows[0] else []
    return "\n".join([*_aligned(names, rows), *best, *_written(record.folder, out, names, rows)])


def _keys(record: Record) -> list[str]:
    return [*dict.fromkeys(key for entry in record.entries for key in entry.values()), "state"]


def _states(record: Record) -> list[str]:
    """Of its entries, in words."""
    if is_held(record.folder):
        return [entry.state for entry in record.entries]
    live = _live() if any(entry.job and entry.state in (RUNNING, STOPPED) for entry in record.entries) else {}
    return [_state(entry, live) for entry in record.entries]


def _live() -> dict[str, str] | None:
    """Number -> state of the jobs that have not ended; None where SLURM is not (another machine has submitted them), or
    does not answer.
    """
    try:
        return {job.number: job.state for job in Slurm().live()}
    except UserError:
        return None


def _state(entry: Entry, live: Mapping[str, str] | None) -> str:
    """A point that was running when its sweep was killed has stopped, unless it is a job; what was told to be stopped
    may be a job still, whose queue did not answer.
    """
    if entry.state not in (RUNNING, STOPPED):
        return entry.state
    if live and entry.job in live:
        return f"job {entry.job} {live[entry.job].lower()}"
    if entry.state == STOPPED or entry.job is None:
        return STOPPED
    return f"job {entry.job}" if live is None else f"job {entry.job} {Slurm().state(entry.job).lower()}"


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


def _written(folder: Path, out: Path | None, names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Where the CSV is, in words; where nobody has asked for it, the table is shown without."""
    try:
        _write(out or folder / TABLE, names, rows)
    except UserError as error:
        if out:
            raise
        print(f"WARNING: {error}; sweep-report out=... writes elsewhere", file=sys.stderr, flush=True)
        return []
    return [f"written to {out or folder / TABLE}"]


def _aligned(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.rjust, line, widths)) for line in cells]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
