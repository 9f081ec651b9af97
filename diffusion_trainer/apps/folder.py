"""What a run's folder holds (folder_lock.py: who may use it)."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from diffusion_trainer.apps.config import dump, read
from diffusion_trainer.callbacks.redaction import filled, redacted
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import needed, whole

# What may differ when a run goes on: how and how long it is computed, watched and measured, not what is computed.
MAY_CHANGE = (
    "resume",
    "name",
    "folder",
    "allowed_targets",
    "num_images",
    "trainer",
    "strategy",
    "compile",
    "channels_last",
    "callbacks",
    "logger",
    "evaluation",
    "sampler",
    "variance",
    "guidance",
)
ORDER = "order"  # of the samples: the fingerprint of the data
CHANGES = "config_changes.txt"  # of a run's folder: when, from which checkpoint on, and what
SWEEP = "sweep.json"  # of a folder that holds the runs of a sweep (apps/sweep_record.py)
LOGS = "logs"
LOCK = ".lock"  # folder_lock.py
JOB = "job.sbatch"  # the script that apps/submit.py last submitted
MAY_CHANGE_INSIDE = (
    "network.checkpoint_blocks",
    "data.sources.*.shards",
    "data.num_workers",
    "data.prefetch",
    "data.shards",
    "data.store",
    "data.damage_budget",
)
# What may not even with resume.allow_config_change: a checkpoint's progress and optimizer state would not fit.
MUST_STAY = ("batch_size", "optimizer._target_", "ema._target_", "ema.profiles*", "ema.main")


def check(folder: Path, config: Mapping[str, Any]) -> None:
    """UserError if the folder holds another run, or something that is no run. Changes that are allowed are shown."""
    if not folder.exists():
        return
    if not (folder / "config.yaml").is_file():
        if (folder / SWEEP).is_file():
            raise UserError(
                f"{folder} is the folder of a sweep, with its runs in it; choose another name=... or folder=..., or go "
                "on with the sweep: the same command with -m"
            )
        strangers = [name for name in sorted(os.listdir(folder)) if name not in (LOCK, LOGS, JOB)]
        if strangers:
            raise UserError(
                f"{folder} is not empty and holds no run ({strangers[0]}, ...); choose another name=... or folder=..."
            )
        return
    changes = differences(read(folder / "config.yaml"), config)
    if not changes:
        return
    of_the_run = [change for change in changes if not change.free]
    lines = [*map(str, of_the_run), *(f"{c} (this may change)" for c in changes if c.free)]
    shown = "\n".join(f"  {line}" for line in lines[:10]) + ("\n  ..." if len(lines) > 10 else "")
    if of_the_run and not config["resume"]["allow_config_change"]:
        raise UserError(
            f"{folder} holds another run; its configuration differs:\n{shown}\n"
            "Give this one another name (name=...), take the changes back to resume that one, or go on with them: "
            "resume.allow_config_change=true"
        )
    stuck = [str(c) for c in of_the_run if any(fnmatchcase(c.key, fixed) for fixed in MUST_STAY)]
    if stuck:
        raise UserError(
            "\n  ".join([f"these cannot change in {folder}, whose checkpoints would not fit:", *stuck])
            + f"\nBegin another run with its weights: name=... init_from={folder}"
        )
    print(f"the configuration of {folder} is another from here on:\n{shown}", flush=True)


@dataclass(frozen=True)
class Change:
    """A value of the configuration that is another. free: it may be, when the run goes on."""

    key: str
    old: Any
    new: Any
    free: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.old} there, {self.new} here"


def differences(old: Any, new: Any, path: str = "", free: bool = False) -> list[Change]:
    """It is what the environment makes of values that is compared. `resume` says what is to be done about it."""
    free = free or any(fnmatchcase(path, key) for key in (*MAY_CHANGE, *MAY_CHANGE_INSIDE))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [key for key in dict.fromkeys([*old, *new]) if path or key != "resume"]
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k), free)]
    return [] if filled(old) == filled(new) else [Change(path, old, new, free)]


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """In place of another one, whose differences are kept in CHANGES: both files, or, with a PassingError, none. The
    same one again needs no room.
    """
    path, begun = folder / "config.yaml", (folder / "config.yaml").is_file()
    text = f"# written by diffusion-trainer train: the resolved configuration\n{dump(config)}"
    if begun and path.read_text() == text:
        return
    changes = differences(read(path), config) if begun else []
    why = "and this configuration is another than the one there" if begun else "and the ranks read it"
    with needed(path, why), whole(path) as part:
        part.write_text(text)
        if changes:
            _note(folder, changes)


def _note(folder: Path, changes: Sequence[Change]) -> None:
    path, newest = folder / CHANGES, folder / "checkpoints" / "latest"
    since = newest.read_text() if newest.is_file() else "the start"
    lines = [time.strftime(f"%Y-%m-%d %H:%M:%S, from {since} on:"), *(f"  {change}" for change in changes)]
    with whole(path) as part:
        before = path.read_text() if path.is_file() else ""
        part.write_text(before + redacted("".join(f"{line}\n" for line in lines)))


def check_order(folder: Path, fingerprint: str | None) -> None:
    """UserError if the run's samples so far came from data with another fingerprint."""
    path = folder / ORDER
    if path.is_file() and path.read_text() != str(fingerprint):
        raise UserError(
            f"{folder} has been training on shards with another index: samples would come in another order from now "
            "on, some again and some never. Bring the old shards and index back, or begin another run with these: "
            f"name=... init_from={folder}"
        )


def write_order(folder: Path, fingerprint: str | None) -> None:
    path = folder / ORDER
    if path.is_file() and path.read_text() == str(fingerprint):
        return
    with needed(path, "by which the next start knows the data again"), whole(path) as part:
        part.write_text(str(fingerprint))


def run_id(folder: Path, saved: str | None = None) -> str:
    """The run's id in Weights & Biases: made once, kept in the folder. saved: what a checkpoint has of it."""
    path = folder / "run_id"
    if not path.is_file():
        with needed(path, "and one run is to have one curve"), whole(path) as part:
            part.write_text(saved or os.urandom(6).hex())
    return path.read_text().strip()
