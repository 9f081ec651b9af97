"""What a run has left out: <run>/rollbacks.json, one entry for each time it went back to a checkpoint."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoint_files import write_text
from diffusion_trainer.training.resuming import Resumable, newest_whole, put_aside
from diffusion_trainer.training.saving import LATEST, folders, order_of

FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """Back to `images_seen`; the `left_out` samples after that checkpoint's were left out from there on.

    undone: the run has since gone on from a still earlier checkpoint.
    """

    images_seen: int
    left_out: int
    reason: str
    undone: bool = False


class Rollbacks:
    """Those of the run in `folder`."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.all = _read(self.path) if self.path.is_file() else []

    def left_out(self, images_seen: int) -> int:
        """How many samples a run that goes on from a checkpoint of so many images has left out until then: the next
        sample's number in the stream is the sum of both.
        """
        return sum(r.left_out for r in self.all if not r.undone and r.images_seen <= images_seen)

    def add(self, back_to: int, seen: int, reason: str) -> None:
        """From `seen` images back to a checkpoint: all samples that were read since it are left out."""
        left_out = seen + self.left_out(seen) - back_to - self.left_out(back_to)
        self.forget_after(back_to)
        self._write([*self.all, Rollback(back_to, left_out, reason)])

    def forget_after(self, images_seen: int) -> None:
        """For a run that goes on from an earlier checkpoint than those it had gone back to."""
        kept = [replace(r, undone=r.undone or r.images_seen > images_seen) for r in self.all]
        if kept != self.all:
            self._write(kept)

    def _write(self, rollbacks: list[Rollback]) -> None:
        write_text(self.path, json.dumps([asdict(r) for r in rollbacks], indent=1) + "\n")
        self.all = rollbacks


def _read(path: Path) -> list[Rollback]:
    try:
        entries = json.loads(path.read_text())
        found = [Rollback(**entry) for entry in entries]
        if isinstance(entries, list) and all(
            type(n) is int and n >= 0 for r in found for n in (r.images_seen, r.left_out)
        ):
            return found
    except (ValueError, TypeError, RecursionError):
        pass  # told below
    raise UserError(
        f"{path} is damaged: it says which data the run has left out, and would see again without it. Put the file "
        "back, or remove it (the run's log has each rollback) to go on with all data"
    )


def left_out(folder: Path, images_seen: int, agreement: Agreement) -> int:
    """`Rollbacks.left_out` as rank 0 sees the file: on the others a network file system may lag. All must call it."""
    first = agreement.rank == 0
    return agreement.gather(Rollbacks(folder).left_out(images_seen) if first else None)[0]


def before(root: Path, images_seen: int, agreement: Agreement) -> Resumable:
    """The newest checkpoint under `root` with at most so many images that is whole, checksums too. All must call it."""
    return newest_whole(root, lambda r: [p for p in folders(r)[::-1] if order_of(p)[0] <= images_seen], agreement)


def go_back_to(checkpoint: Path) -> None:
    """Makes it the newest of its run; later ones are kept under another name."""
    write_text(checkpoint.parent / LATEST, checkpoint.name)  # first: from here on it is the one to resume from
    set_aside_after(checkpoint.parent, order_of(checkpoint))


def set_aside_after(root: Path, order: tuple[int, int]) -> None:
    for later in [p for p in folders(root) if order_of(p) > order]:
        put_aside(later)
