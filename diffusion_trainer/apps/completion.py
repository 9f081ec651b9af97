"""Whether a run has come to its end, told from its folder alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.callbacks.evaluating import owed
from diffusion_trainer.callbacks.redaction import filled
from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.resuming import resumable


def trained(config: Mapping[str, Any]) -> bool:
    """Whether `train` with this resolved configuration would find nothing left to do in its folder: the same
    configuration there, a checkpoint that has seen all images, and the last evaluation written.
    """
    folder = Path(config["folder"])
    if not (folder / "config.yaml").is_file():
        return False
    try:
        there, ours = filled(configuration.read(folder / "config.yaml")), filled(config)
        if there != {name: ours[name] for name in there if name in ours}:
            return False
        return at_its_end(config, folder) is not None
    except UserError:
        return False  # a file that is damaged: `train` says which, and what to do


def at_its_end(config: Mapping[str, Any], folder: Path) -> int | None:
    """The images that the run in the folder has seen, if it has no more to see and no evaluation is owed.

    UserError for a checkpoint that is damaged.
    """
    checkpoint = resumable(folder / "checkpoints", Agreement(), thorough=False).checkpoint
    if checkpoint is None or checkpoint.images_seen < config["num_images"]:
        return None
    return None if owed(callbacks_of(config), folder, checkpoint) else checkpoint.images_seen


def nothing_left(config: Mapping[str, Any], folder: Path, say: bool) -> bool:
    """Whether the run in the folder is `at_its_end`; say: and tell it."""
    done = at_its_end(config, folder)
    if done is not None and say:
        print(f"  already at {done:,} images; a larger num_images trains on", flush=True)
    return done is not None


def callbacks_of(config: Mapping[str, Any]) -> list[Callback]:
    """As the configuration has them."""
    built = build(config["callbacks"], "callbacks", config["allowed_targets"])
    return [callback for callback in built.values() if callback is not None]
