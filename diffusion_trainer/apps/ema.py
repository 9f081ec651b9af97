"""diffusion-trainer ema: an average of any length, made after training from a run's snapshots."""

from collections.abc import Sequence
from pathlib import Path

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.export import DTYPES, SUFFIX, FileConfig, about, check_place
from diffusion_trainer.apps.finished import compose, written
from diffusion_trainer.apps.initial import checkpoint_in, run_of
from diffusion_trainer.callbacks.ema_snapshots import FOLDER, KEY
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole
from diffusion_trainer.training.checkpoint_files import sync
from diffusion_trainer.training.checkpoints import Checkpoint
from diffusion_trainer.training.consolidation import consolidate
from diffusion_trainer.training.ema import gamma_of
from diffusion_trainer.training.posthoc_ema import Combination, Shares, factors
from diffusion_trainer.training.saving import folders


class EmaConfig(FileConfig):
    relative_std: float
    images_seen: int | None


def show(overrides: Sequence[str]) -> str:
    return configuration.dump(_load(overrides))


def _load(overrides: Sequence[str]) -> dict:
    return compose("ema", overrides, EmaConfig, ())


def main(overrides: Sequence[str]) -> int:
    config = _load(overrides)
    run, std = run_of(checkpoint_in(Path(config["checkpoint"]))), config["relative_std"]
    try:
        gamma = gamma_of(std)
    except ValueError as error:
        raise UserError(str(error)) from error
    parts, end = _parts(run, config["images_seen"])
    shares, wanted = [s for _, s in parts], Shares(end, gamma)
    by = factors(shares, wanted)
    out = Path(config["out"] or run / "exports" / f"images-{end:012d}-ema-{std:g}-{config['dtype']}{SUFFIX}")
    check_place(out, config["overwrite"])
    last = parts[-1][0][0]
    metadata = about(last, f"ema of relative_std {std:g}") | {"dtype": config["dtype"]}
    with written(out):
        with whole(out) as part:
            consolidate(Combination([p for p, _ in parts], by), KEY, part, DTYPES[config["dtype"]], metadata)
        sync(out.parent)
    error = wanted.error(shares, by)
    print(f"ema of relative_std {std:g} at {end:,} images from {len(parts)} averages: {out}")
    print(f"  its shares of the past weights are wrong by {error:.1%} (L2){'' if error < 0.1 else _advice(error)}")
    return 0


def _advice(error: float) -> str:
    return ": that is much; keep more snapshots (callbacks.ema_snapshots), or make one of a length between those kept"


def _parts(run: Path, images_seen: int | None) -> tuple[list[tuple[tuple[Checkpoint, str], Shares]], int]:
    """The snapshots' averages up to images_seen (null: all), each with its shares, and where they end."""
    there = [Checkpoint(path, whole=()) for path in folders(run / FOLDER)]
    if not there:
        raise UserError(
            f"{run / FOLDER} holds no snapshots: train with ema=several (or ema=power) and "
            "+callbacks.ema_snapshots._target_=diffusion_trainer.callbacks.ema_snapshots.EmaSnapshots "
            "+callbacks.ema_snapshots.every_n_images=..."
        )
    times = sorted({c.images_seen for c in there})
    end = times[-1] if images_seen is None else images_seen
    if end not in times:
        nearest = min(times, key=lambda t: abs(t - end))
        raise UserError(f"images_seen={end} is none of the {len(times)} snapshots; the nearest is {nearest}")
    found = [
        ((checkpoint, key), Shares(checkpoint.images_seen, gamma_of(std)))
        for checkpoint in there
        if checkpoint.images_seen <= end
        for key, std in checkpoint.manifest["state"][KEY].items()
    ]
    return found, end
