"""Where metrics go: a CSV file that survives restarts, and Weights & Biases."""

import csv
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL.Image import Image

from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole


class LoggerChoice(ABC):
    """A choice of conf/logger."""

    @abstractmethod
    def build(self, folder: Path, name: str, run_id: str, config: Mapping, started_at: int) -> Logger:
        """For the run in `folder` that (re)starts at `started_at` images seen."""


class CsvLogger(Logger):
    """metrics.csv: a row for each time something was logged, a column for each metric, ordered by images seen.

    A restart keeps the rows up to where it starts: what the lost steps had logged will be logged again.
    (Lightning's CSVLogger deletes an existing file.)
    """

    def __init__(self, path: Path, started_at: int):
        self.path, self._rows = path, []
        if path.is_file():
            self._rows = [r for r in _whole_rows(path) if int(r["images_seen"]) <= started_at]
        self._columns = list(dict.fromkeys(key for row in self._rows for key in row))
        self._whole = False  # whether the file holds exactly the rows and columns known here

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        return None  # config.yaml stands beside

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"images_seen": step, **metrics}
        new = [key for key in row if key not in self._columns]
        self._columns += new
        self._rows.append(row)
        if new or not self._whole:
            with whole(self.path) as part, part.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns, restval="")
                writer.writeheader()
                writer.writerows(self._rows)
            self._whole = True
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns, restval="").writerow(row)


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """Without what a crash left half-written: rows that are short, or whose first field is no number."""
    text = path.read_bytes().replace(b"\0", b"").decode(errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [r for r in csv.DictReader(lines) if None not in r.values() and r.get("images_seen", "").isdecimal()]


@dataclass(frozen=True)
class Csv(LoggerChoice):
    """<run>/metrics.csv."""

    def build(self, folder: Path, name: str, run_id: str, config: Mapping, started_at: int) -> Logger:
        return CsvLogger(folder / "metrics.csv", started_at)


@dataclass(frozen=True)
class Wandb(LoggerChoice):
    """Weights & Biases: one run and one curve over images seen, however often it is restarted.

    mode null: WANDB_MODE if that is set, else online for a user who is logged in and offline otherwise (send offline
    runs later with `wandb sync`).
    """

    project: str
    entity: str | None = None
    mode: str | None = None

    def __post_init__(self):
        if self.mode not in (None, "online", "offline"):
            raise UserError(f"logger.wandb.mode must be online, offline or null, not {self.mode}")

    def build(self, folder: Path, name: str, run_id: str, config: Mapping, started_at: int) -> Logger:
        # Offline records reach the disk every 15 s by default: a killed process would lose that much.
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        mode = self.mode or os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        logger = WandbLogger(
            name=name, project=self.project, entity=self.entity, id=run_id, resume="allow", save_dir=folder,
            offline=mode == "offline", mode=mode, config=dict(config), settings={"silent": True, "console": "off"},
        )  # fmt: skip
        logger._wandb_init.pop("anonymous")  # Lightning passes it always, wandb warns of it always
        if rank_zero_only.rank == 0:
            logger.experiment.define_metric("images_seen")
            logger.experiment.define_metric("*", step_metric="images_seen")
        return logger


def _logged_in() -> bool:
    import wandb

    return wandb.login(prompt=False, verify=False)  # only whether there are credentials; nothing is sent


def log_picture(logger: Logger, name: str, picture: Image, images_seen: int) -> None:
    """To a logger that shows pictures; for others they are in the run's folder."""
    if isinstance(logger, WandbLogger):
        import wandb

        logger.log_metrics({"images_seen": images_seen, name: wandb.Image(picture)}, step=images_seen)


def alert(logger: Logger, title: str, text: str) -> None:
    """A message that Weights & Biases sends to those who follow the run; other loggers have none."""
    if isinstance(logger, WandbLogger):
        logger.experiment.alert(title=title, text=text, level="WARN")
