"""Variance statistics beside a checkpoint: where they are, what wrote them, and whether they are this checkpoint's."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from diffusion_trainer.apps.initial import run_of
from diffusion_trainer.conventions import UserError
from diffusion_trainer.process import analytic

KEY = "statistics"  # of the nodes of a configuration that read such a file


def path_of(checkpoint: Path, weights: str) -> Path:
    return run_of(checkpoint) / "variances" / f"{checkpoint.name}-{weights}.safetensors"


def about(checkpoint: Path, weights: str) -> dict[str, str]:
    """What tells a model from others: a digest of its checkpoint's manifest, and which of its weights."""
    digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    return {"checkpoint": checkpoint.name, "manifest": digest, "weights": weights}


def write(path: Path, statistics: analytic.Statistics) -> None:
    """OSError if it cannot be written; what was there before is then intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    tensors = {"log_snr": statistics.log_snr, "error": statistics.error.contiguous()}
    save_file(tensors, part, metadata={"about": json.dumps(statistics.about)})
    part.replace(path)


def resolve(node: Any, checkpoint: Path, weights: str) -> Any:
    """The configuration with every `statistics: null` replaced by the checkpoint's own file.

    UserError if a file that it names was measured on another model.
    """
    if isinstance(node, list):
        return [resolve(item, checkpoint, weights) for item in node]
    if not isinstance(node, Mapping):
        return node
    resolved = {k: resolve(v, checkpoint, weights) for k, v in node.items()}
    if KEY in resolved:
        resolved[KEY] = resolved[KEY] or str(path_of(checkpoint, weights))
        _check(resolved[KEY], checkpoint, weights)
    return resolved


def reads(node: Any) -> bool:
    """Whether a part of a configuration needs such a file."""
    if isinstance(node, list):
        return any(map(reads, node))
    return isinstance(node, Mapping) and (KEY in node or any(map(reads, node.values())))


def _check(path: str, checkpoint: Path, weights: str) -> None:
    if not Path(path).is_file():
        return  # said when it is read
    try:
        theirs = analytic.read(path).about
    except ValueError as error:
        raise UserError(str(error)) from error
    ours = about(checkpoint, weights)
    if any(theirs.get(key) != value for key, value in ours.items()):
        raise UserError(
            f"statistics={path} were measured on checkpoint {theirs.get('checkpoint')} ({theirs.get('weights')} "
            f"weights), not on {checkpoint} ({weights} weights); run `diffusion-trainer variance "
            f"checkpoint={checkpoint}{'' if weights == 'ema' else f' weights={weights}'}`"
        )
