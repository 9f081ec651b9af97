"""A run's folder: who may use it, and what it holds."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from diffusion_trainer.apps.config import dump, read
from diffusion_trainer.callbacks.redaction import filled
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole

# What may differ when a run goes on: how and how long it is computed and watched, not what is computed.
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
SWEEP = "sweep.json"  # of a folder that holds the runs of a sweep (apps/sweep_record.py)
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
MUST_STAY = ("batch_size", "optimizer._target_", "ema._target_", "ema.profiles*")


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """The folder, ours alone; UserError if a living process holds it, or it cannot be written.

    Yields the lock's descriptor: while a process that inherited it lives, the folder is held.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"folder={folder} cannot be written ({error}); choose another folder=...") from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is training in {folder}; wait for it or give this run another name=..."
            ) from error
        yield lock.fileno()


def check(folder: Path, config: Mapping[str, Any]) -> None:
    """UserError if the folder holds another run, or something that is no run. A change that is allowed is shown."""
    if not folder.exists():
        return
    if not (folder / "config.yaml").is_file():
        if (folder / SWEEP).is_file():
            raise UserError(
                f"{folder} is the folder of a sweep, with its runs in it; choose another name=... or folder=..., or go "
                "on with the sweep: the same command with -m"
            )
        strangers = [name for name in sorted(os.listdir(folder)) if name not in (".lock", "logs", JOB)]
        if strangers:
            raise UserError(
                f"{folder} is not empty and holds no run ({strangers[0]}, ...); choose another name=... or folder=..."
            )
        return
    changes = differences(read(folder / "config.yaml"), config)
    if not changes:
        return
    shown = "\n".join(f"  {line}" for line in changes[:10]) + ("\n  ..." if len(changes) > 10 else "")
    if not config["resume"]["allow_config_change"]:
        raise UserError(
            f"{folder} holds another run; its configuration differs:\n{shown}\n"
            "Give this one another name (name=...), take the changes back to resume that one, or go on with them: "
            "resume.allow_config_change=true"
        )
    stuck = [c for c in changes if any(fnmatchcase(c.split(":")[0], fixed) for fixed in MUST_STAY)]
    if stuck:
        raise UserError(
            "\n  ".join([f"these cannot change in {folder}, whose checkpoints would not fit:", *stuck])
            + f"\nBegin another run with its weights: name=... init_from={folder}"
        )
    print(f"the configuration of {folder} is another from here on:\n{shown}", flush=True)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line for each value that differs and may not; it is what the environment makes of it that is compared."""
    if any(fnmatchcase(path, free) for free in (*MAY_CHANGE, *MAY_CHANGE_INSIDE)):
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    return [] if filled(old) == filled(new) else [f"{path}: {old} there, {new} here"]


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    with whole(folder / "config.yaml") as part:
        part.write_text(f"# written by diffusion-trainer train: the resolved configuration\n{dump(config)}")


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
    with whole(folder / ORDER) as part:
        part.write_text(str(fingerprint))


def run_id(folder: Path) -> str:
    """The run's id in Weights & Biases: made once, kept in the folder."""
    path = folder / "run_id"
    if not path.is_file():
        with whole(path) as part:
            part.write_text(os.urandom(6).hex())
    return path.read_text().strip()
