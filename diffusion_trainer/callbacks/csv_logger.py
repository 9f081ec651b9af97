"""metrics.csv, which survives restarts."""

import csv
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from diffusion_trainer.callbacks.run_logger import RunLogger
from diffusion_trainer.evaluation.writing import whole


class CsvLogger(RunLogger):
    """metrics.csv: a row for each number of images seen at which something was logged, a column for each metric.

    A restart keeps the rows up to where it starts: what the lost steps had logged will be logged again. What is logged
    again at the same images takes the place of what was there. (Lightning's CSVLogger deletes an existing file.)
    """

    def __init__(self, path: Path, started_at: int):
        self.path = path
        rows = read_rows(path) if path.is_file() else []
        self._rows = {int(row["images_seen"]): row for row in rows if int(row["images_seen"]) <= started_at}
        self._columns = list(dict.fromkeys(key for row in self._rows.values() for key in row))
        self._whole = False  # whether the file holds exactly the rows and columns known here
        self._lacking: set[int] = set()  # images of the rows that could not be written

    @property
    def name(self) -> str:
        return "csv"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """OSError if it cannot be written now: then it is with the next one, or by `save`."""
        row = {"images_seen": step, **metrics}
        new = [key for key in row if key not in self._columns]
        self._columns += new
        last = step > max(self._rows, default=-1)
        self._rows[step] = self._rows.get(step, {}) | row
        append, self._whole = self._whole and last and not new, False
        self._lacking.add(step)
        if append:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns, restval="").writerow(row)
        else:
            self._write()
        self._whole = True
        self._lacking.clear()

    def _write(self) -> None:
        with whole(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows[images] for images in sorted(self._rows))

    def save(self) -> None:
        """Before each checkpoint: writes what could not be written, if that can be done now. (That it could not has
        been said.)
        """
        with suppress(OSError):
            self._catch_up()

    def _catch_up(self) -> None:
        if self._lacking:
            self._write()
            self._whole = True
            self._lacking.clear()

    def finalize(self, status: str) -> None:
        """Says what is lacking for good."""
        try:
            self._catch_up()
        except OSError as error:
            count = len(self._lacking)
            print(f"  WARNING: {self.path} lacks {count:,} rows, which could not be written: {error}", flush=True)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Without what a crash left half-written: rows that are short, or whose first field is no number."""
    text = path.read_bytes().replace(b"\0", b"").decode(errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [r for r in csv.DictReader(lines) if None not in r.values() and r.get("images_seen", "").isdecimal()]
