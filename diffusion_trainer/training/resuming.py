"""Which checkpoint a run goes on from: the newest whole one, found by all ranks together."""

from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import NamedTuple

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoint_files import DamagedCheckpoint
from diffusion_trainer.training.checkpoints import Checkpoint, named_by_latest
from diffusion_trainer.training.saving import folders, order_of

LAG_SECONDS = 60  # that a network file system may show one rank an old list of a folder, by its defaults


class Resumable(NamedTuple):
    checkpoint: Checkpoint | None  # the newest whole one
    damage: list[str]  # what is wrong with those after it, the newest first
    damaged: list[Path]  # their folders


def resumable(root: Path, agreement: Agreement, thorough: bool = True) -> Resumable:
    """The newest checkpoint that is whole, the same on all ranks, which must all call it; None if there has been none.

    thorough: checksums too, each file's on one of the ranks; else what can be seen without reading it. UserError if
    there are checkpoints and none is whole; PassingError if one cannot be read now, or ranks see different ones.
    """
    found = newest_whole(root, _up_to_latest, agreement, thorough)
    if found.checkpoint is None and found.damage:
        raise UserError(
            "\n  ".join([f"no checkpoint in {root} is whole:", *found.damage]) + "\nPut one of these files back, or "
            "begin anew under another name=..."
        )
    return found


def newest_whole(
    root: Path, newest_first: Callable[[Path], list[Path]], agreement: Agreement, thorough: bool = True
) -> Resumable:
    """The first whole one of newest_first(root), `resumable`'s way; without one, `checkpoint` is None."""
    candidates = _agreed(root, newest_first, agreement)
    share = slice(agreement.rank, None, agreement.world) if thorough else None
    damage: list[str] = []
    for i, folder in enumerate(candidates):
        checkpoint, problem = _look(folder, share)
        problems = [p for p in agreement.gather(problem) if p]
        if not problems:
            return Resumable(checkpoint, damage, candidates[:i])
        if passing := [p.text for p in problems if p.passing]:
            raise PassingError(passing[0])
        damage.append(problems[0].text)
    return Resumable(None, damage, candidates)


def _agreed(root: Path, listed: Callable[[Path], list[Path]], agreement: Agreement) -> list[Path]:
    """listed(root) once all ranks have the same; PassingError if they do not within LAG_SECONDS."""
    for _ in range(LAG_SECONDS):
        names = agreement.gather([p.name for p in listed(root)])
        if all(seen == names[0] for seen in names):
            return [root / name for name in names[0]]
        sleep(1)
    raise PassingError(
        f"for {LAG_SECONDS} s ranks have seen different checkpoints in {root}: all nodes must share that folder. If "
        "they do, start the run again"
    )


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
