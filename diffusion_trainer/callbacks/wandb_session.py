"""One session with Weights & Biases: what it is told, and that it is told once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wandb
from PIL.Image import Image

from diffusion_trainer.callbacks.csv_logger import read_rows
from diffusion_trainer.callbacks.wandb_files import leave_out, pictures, points, received, records

ONLINE, OFFLINE = "online", "offline"


class Session:
    """Online, it tells what the server lacks, whoever was to send that; else what no record in the folder has."""

    def __init__(self, folder: Path, mode: str, begin: Callable[[str], Any]):
        """begin: makes the wandb.Run, in a mode."""
        self.folder, self.online = folder, mode == ONLINE
        self._before = records(folder)
        self.run = begin(mode)
        # `step=` is not ours to say: `wandb sync` adds that of the rows to where the server is.
        self._known = received(folder, self.run.starting_step) if self.online else points(folder)

    def catch_up(self, reached: int) -> int:
        """Tells all until `reached` images that it should have; the number of rows. What is beyond was logged by steps
        that are lost, and is yet to come again.
        """
        rows: dict[int, dict[str, Any]] = {}
        for at, name, file in pictures(self.folder) if self.online else ():
            rows.setdefault(at, {})[name] = file
        path = self.folder / "metrics.csv"
        for row in read_rows(path) if path.is_file() else []:
            numbers = {key: float(value) for key, value in row.items() if value and key != "images_seen"}
            rows.setdefault(int(row["images_seen"]), {}).update(numbers)
        told = sum(self.log({"images_seen": at, **rows[at]}) for at in sorted(rows) if at <= reached)
        if self.online:
            leave_out(self._before)
        return told

    def log(self, row: Mapping[str, Any]) -> bool:
        """Whether there was anything new in it. A picture is one, or its file."""
        at = row["images_seen"]
        new = {k: _told(v) for k, v in row.items() if k != "images_seen" and (at, k) not in self._known}
        if new:
            self.run.log({"images_seen": at, **new})
            self._known |= {(at, k) for k in new}
        return bool(new)


def _told(value: Any) -> Any:
    return wandb.Image(str(value) if isinstance(value, Path) else value) if isinstance(value, Image | Path) else value
