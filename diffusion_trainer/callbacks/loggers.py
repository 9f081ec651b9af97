"""Where metrics go: a CSV file that survives restarts, and Weights & Biases."""

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusion_trainer.callbacks.csv_logger import CsvLogger
from diffusion_trainer.callbacks.run_logger import RunLogger
from diffusion_trainer.conventions import PassingError, UserError


class LoggerChoice(ABC):
    """A choice of conf/logger."""

    @abstractmethod
    def build(self, folder: Path, name: str, run_id: str, config: Mapping, started_at: int) -> RunLogger:
        """For the run in `folder` that (re)starts at `started_at` images seen."""


@dataclass(frozen=True)
class Csv(LoggerChoice):
    """<run>/metrics.csv."""

    def build(self, folder: Path, name: str, run_id: str, config: Mapping, started_at: int) -> RunLogger:
        return CsvLogger(folder / "metrics.csv", started_at)


@dataclass(frozen=True)
class Wandb(LoggerChoice):
    """Weights & Biases: one run and one curve over images seen, however often it is restarted (see WandbCurve).

    mode null: WANDB_MODE if that is set, else online for a user who is logged in and offline otherwise (`wandb-sync`
    sends it later). Timeouts: what training may wait for it at the start, then offline; and at the end.
    """

    project: str
    entity: str | None = None
    mode: str | None = None
    init_timeout_seconds: float = 30
    finish_timeout_seconds: float = 60

    def __post_init__(self):
        if self.mode not in (None, "online", "offline"):
            raise UserError(f"logger.wandb.mode must be online, offline or null, not {self.mode}")
        if not self.init_timeout_seconds > 0 or not self.finish_timeout_seconds > 0:
            raise UserError("logger.wandb: init_timeout_seconds and finish_timeout_seconds must be positive")

    def resolved_mode(self) -> str:
        """The mode that a run here and now has."""
        return self.mode or os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")

    def build(self, folder: Path, name: str, run_id: str, config: Mapping, started_at: int) -> RunLogger:
        # Offline records reach the disk every 15 s by default: a killed process would lose that much.
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        from diffusion_trainer.callbacks.wandb_curve import WandbCurve

        begin = partial(self._begin, folder, name, run_id, config)
        return WandbCurve(
            folder, self.resolved_mode(), begin, started_at, self.init_timeout_seconds, self.finish_timeout_seconds
        )

    def send(self, folder: Path, name: str, run_id: str, config: Mapping) -> int:
        """Tells the server all that it lacks of a run that is not running; the number of rows. UserError unless they
        have arrived.
        """
        import wandb

        from diffusion_trainer.callbacks.wandb_files import identity
        from diffusion_trainer.callbacks.wandb_session import ONLINE, Session, rows_there

        try:
            session = Session(folder, ONLINE, partial(self._begin, folder, name, run_id, config, **identity(folder)))
            rows = session.catch_up(sys.maxsize)
            session.run.finish()
            all_of_them, end = session.run.starting_step + rows, time.monotonic() + self.finish_timeout_seconds
            while (there := rows_there(session.run)) < all_of_them and time.monotonic() < end:
                time.sleep(1)  # it may count late
        except (wandb.Error, PassingError) as error:
            raise PassingError(f"{folder} was not sent to {server()}: {error}") from error
        if there < all_of_them:
            raise PassingError(
                f"{folder}: {rows:,} rows were sent to {server()}, and {all_of_them - there:,} have not arrived; the "
                "same command sends them again"
            )
        session.leave_out()
        return rows

    def _begin(self, folder: Path, name: str, run_id: str, config: Mapping, mode: str, **more: Any) -> Any:
        import wandb

        run = wandb.init(
            name=name, project=self.project, entity=self.entity, id=run_id, resume="allow", dir=folder, mode=mode,
            config=dict(config), **more,
            settings={"silent": True, "console": "off", "init_timeout": self.init_timeout_seconds},
        )  # fmt: skip
        run.define_metric("images_seen")
        run.define_metric("*", step_metric="images_seen")
        return run


def logged_in() -> bool:
    import wandb

    return wandb.login(prompt=False, verify=False)  # only whether there are credentials; nothing is sent


def server() -> str:
    """The URL that runs are sent to: WANDB_BASE_URL, or what the user's settings say."""
    import wandb

    return wandb.setup().settings.base_url
