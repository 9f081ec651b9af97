"""Whether a run that something has happened to is the one that was left alone."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from ledgers import lines

from diffusion_trainer.callbacks.wandb_files import history
from diffusion_trainer.training.checkpoints import Checkpoint, latest

PICTURES = "eval/samples"


def check_nothing_lost(run: Path, alone: Path) -> None:
    """Against a run that was left alone: `check_same_end`, each step once in metrics.csv and in the one W&B run, with
    the same numbers, no evaluation missing.
    """
    check_same_end(run, alone)
    check_one_curve(run, alone)


def check_same_end(run: Path, alone: Path) -> None:
    """Weights, averages and moments bitwise, as many steps, and the samples of each step (spies.Ledger)."""
    ours, theirs = (Checkpoint(latest(path / "checkpoints")) for path in (run, alone))
    assert [ours.manifest[key] for key in ("images_seen", "optimizer_steps", "parameters")] == [
        theirs.manifest[key] for key in ("images_seen", "optimizer_steps", "parameters")
    ]
    assert ours.kinds == theirs.kinds
    for kind in theirs.kinds:
        a, b = ours.whole(kind), theirs.whole(kind)
        assert a.keys() == b.keys()
        assert not [name for name in b if not torch.equal(a[name], b[name])], kind
    assert set(lines(run)) == set(lines(alone))
    assert [path.name for path in (run / "checkpoints").glob(".images-*")] == []


def check_one_curve(run: Path, alone: Path) -> None:
    """Each step once, with the numbers of a run that was left alone, in metrics.csv and in one W&B run."""
    rows, told = table(run), told_wandb(run)
    assert numbers(rows) == numbers(table(alone))
    assert counted(told) == counted(rows)
    assert pictures(told) == pictures(told_wandb(alone))
    assert len({path.stem for path in (run / "wandb").glob("*run-*/run-*.wandb")}) == 1


def table(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def told_wandb(run: Path) -> list[dict]:
    """What W&B was told, by all starts."""
    return [row for path in sorted((run / "wandb").glob("*run-*/run-*.wandb")) for row in history(path)]


def numbers(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Without what depends on how fast the machine was."""
    return [{key: row[key] for key in row if not of_the_machine(key)} for row in rows]


def counted(rows: Sequence[Mapping]) -> Counter:
    """How often each number is there: images seen, metric, value (but for what depends on the machine)."""
    return Counter(
        (int(row["images_seen"]), key, None if of_the_machine(key) else float(value))
        for row in rows
        for key, value in row.items()
        if value != "" and not key.startswith("_") and key not in ("images_seen", PICTURES)
    )


def pictures(told: Sequence[Mapping]) -> set[tuple[int, str]]:
    """Images seen and checksum."""
    return {(row["images_seen"], row[PICTURES]["sha256"]) for row in told if PICTURES in row}


def of_the_machine(metric: str) -> bool:
    return "seconds" in metric or "per_second" in metric
