"""What a run has left out: <run>/rollbacks.json, one entry for each time it went back to a checkpoint."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusion_trainer.training.checkpoint_files import MANIFEST, write_text
from diffusion_trainer.training.checkpoints import put_aside
from diffusion_trainer.training.saving import LATEST, folders, order_of

FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """Back to `images_seen`; the `left_out` images that it had been trained on since were left out from there on."""

    images_seen: int
    left_out: int
    reason: str


class Rollbacks:
    """Those of the run in `folder`."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        entries = json.loads(self.path.read_text()) if self.path.is_file() else []
        self.all = [Rollback(**entry) for entry in entries]

    def left_out(self, images_seen: int) -> int:
        """How many images a run that goes on from a checkpoint of so many has left out until then: the next sample's
        number in the stream is the sum of both.
        """
        return sum(r.left_out for r in self.all if r.images_seen <= images_seen)

    def add(self, rollback: Rollback) -> None:
        self._write([*self.all, rollback])

    def forget_after(self, images_seen: int) -> None:
        """For a run that goes on from an earlier checkpoint than those it had gone back to."""
        kept = [r for r in self.all if r.images_seen <= images_seen]
        if kept != self.all:
            self._write(kept)

    def _write(self, rollbacks: list[Rollback]) -> None:
        write_text(self.path, json.dumps([asdict(r) for r in rollbacks], indent=1) + "\n")
        self.all = rollbacks


def before(folder: Path, images_seen: int) -> Path | None:
    """The newest checkpoint of the run in `folder` with at most so many images; None if there is none."""
    there = [p for p in folders(folder / "checkpoints") if order_of(p)[0] <= images_seen and (p / MANIFEST).is_file()]
    return there[-1] if there else None


def go_back_to(checkpoint: Path) -> None:
    """Makes it the newest of its run; later ones are kept under another name."""
    write_text(checkpoint.parent / LATEST, checkpoint.name)  # first: from here on it is the one to resume from
    for later in [p for p in folders(checkpoint.parent) if order_of(p) > order_of(checkpoint)]:
        put_aside(later)
