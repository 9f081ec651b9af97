"""Which checkpoint a run goes on from: the newest whole one, found by all ranks together."""

from pathlib import Path
from typing import NamedTuple

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoint_files import DamagedCheckpoint
from diffusion_trainer.training.checkpoints import Checkpoint, named_by_latest
from diffusion_trainer.training.saving import folders, order_of


class Resumable(NamedTuple):
    checkpoint: Checkpoint | None  # the newest whole one
    damage: list[str]  # what is wrong with those after it, the newest first
    damaged: list[Path]  # their folders


def resumable(root: Path, agreement: Agreement, thorough: bool = True) -> Resumable:
    """The newest checkpoint that is whole, the same on all ranks, which must all call it; None if there has been none.

    thorough: checksums too, each file's on one of the ranks; else what can be seen without reading it. UserError if
    there are checkpoints and none is whole, or if ranks see different ones; PassingError if one cannot be read now.
    """
    found = newest_whole(root, _up_to_latest(root), agreement, thorough)
    if found.checkpoint is None and found.damage:
        raise UserError(
            "\n  ".join([f"no checkpoint in {root} is whole:", *found.damage]) + "\nPut one of these files back, or "
            "begin anew under another name=..."
        )
    return found


def newest_whole(root: Path, newest_first: list[Path], agreement: Agreement, thorough: bool = True) -> Resumable:
    """The first whole one of these folders under `root`, `resumable`'s way; without one, `checkpoint` is None."""
    names = agreement.gather([p.name for p in newest_first])
    if any(seen != names[0] for seen in names):  # a network file system that has not caught up
        raise UserError(f"ranks see different checkpoints in {root}; start the run again")
    share = slice(agreement.rank, None, agreement.world) if thorough else None
    damage: list[str] = []
    for i, folder in enumerate(root / name for name in names[0]):
        checkpoint, problem = _look(folder, share)
        problems = [p for p in agreement.gather(problem) if p]
        if not problems:
            return Resumable(checkpoint, damage, [root / name for name in names[0][:i]])
        if passing := [p.text for p in problems if p.passing]:
            raise PassingError(passing[0])
        damage.append(problems[0].text)
    return Resumable(None, damage, [root / name for name in names[0]])


def _up_to_latest(root: Path) -> list[Path]:
    """The newest first. Later ones than `latest` names are of a future that somebody went back from."""
    there, named = folders(root)[::-1], named_by_latest(root)
    return [p for p in there if named is None or order_of(p) <= order_of(named)] or there


class Problem(NamedTuple):
    text: str
    passing: bool  # whether the checkpoint cannot be read now, and may be whole


def _look(folder: Path, share: slice | None) -> tuple[Checkpoint | None, Problem | None]:
    """The checkpoint, or what is wrong with it. share: of its files, whose checksums this rank looks at."""
    try:
        checkpoint = Checkpoint(folder)
        if share is not None:
            checkpoint.verify(sorted(checkpoint.files)[share])
            checkpoint.verified |= set(checkpoint.files)  # the others' too, once they say so
    except DamagedCheckpoint as error:
        return None, Problem(error.problem, passing=False)
    except PassingError as error:
        return None, Problem(str(error), passing=True)
    return checkpoint, None


def put_aside(folder: Path) -> Path:
    """Renames a checkpoint that is not to be gone on from, so that it counts as none and is still there to look at."""
    aside = folder.with_name(f"aside-{folder.name}")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}-again")
    return folder.rename(aside)
