"""Variance statistics beside a checkpoint: where they are, what wrote them, and whether they are this checkpoint's."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from diffusion_trainer.apps.initial import run_of
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole
from diffusion_trainer.process import analytic

KEY = "statistics"  # of the nodes of a configuration that read such a file
BOUND = "x_0_bound"  # estimates were clipped to it


def path_of(checkpoint: Path, weights: str) -> Path:
    name = f"file-{Path(weights).stem}" if weights.endswith(".safetensors") else weights
    return run_of(checkpoint) / "variances" / f"{checkpoint.name}-{name}.safetensors"


def about(checkpoint: Path, weights: str) -> dict[str, str]:
    """What tells a model from others: a digest of its checkpoint's manifest, and which of its weights."""
    digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    return {"checkpoint": checkpoint.name, "manifest": digest, "weights": weights, **digest_of(weights)}


def digest_of(weights: str) -> dict[str, str]:
    """Of the file, where `weights` names one: another may be written under its name."""
    if not weights.endswith(".safetensors") or not Path(weights).is_file():
        return {}
    return {"weights_sha256": hashlib.sha256(Path(weights).read_bytes()).hexdigest()}


def write(path: Path, statistics: analytic.Statistics) -> None:
    """OSError or SafetensorError if it cannot be written; what was there before is then intact."""
    tensors = {"log_snr": statistics.log_snr, "error": statistics.error.contiguous()}
    if statistics.decoding is not None:
        tensors["decoding"] = statistics.decoding
    with whole(path) as part:
        save_file(tensors, part, metadata={"about": json.dumps(statistics.about)})


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


def files(node: Any) -> Iterator[str | None]:
    """All that a part of a configuration reads; None where the checkpoint's own is meant."""
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node if isinstance(node, list) else ()):
        if key == KEY:
            yield value
        else:
            yield from files(value)


def check_bound(config: Mapping[str, Any], x_0_bound: float | None) -> None:
    """UserError if statistics that are to be read are missing, or of estimates that were clipped to another bound."""
    for path in files(config):
        try:
            theirs = analytic.required(path, "this choice").about.get(BOUND, "(not recorded)")
        except ValueError as error:
            raise UserError(str(error)) from error
        if theirs != x_0_bound:
            there, here = ("null" if bound is None else bound for bound in (theirs, x_0_bound))
            raise UserError(
                f"statistics={path} were measured of estimates clipped to {BOUND}={there}, and here they are clipped "
                f"to {BOUND}={here}: their errors differ; run `{_command(config['checkpoint'], config['weights'])} "
                f"sampler.{BOUND}={here}`, or use the bound of the statistics"
            )


def _check(path: str, checkpoint: Path, weights: str) -> None:
    theirs, ours = _about(path), about(checkpoint, weights)
    if theirs is not None and any(theirs.get(key) != value for key, value in ours.items()):
        raise UserError(
            f"statistics={path} were measured on checkpoint {theirs.get('checkpoint')} ({theirs.get('weights')} "
            f"weights), not on {checkpoint} ({weights} weights); run `{_command(checkpoint, weights)}`"
        )


def _about(path: str) -> dict | None:
    """None if there is no such file: that is said when it is read."""
    try:
        return analytic.read(path).about if Path(path).is_file() else None
    except ValueError as error:
        raise UserError(str(error)) from error


def _command(checkpoint: str | Path, weights: str) -> str:
    return f"diffusion-trainer variance checkpoint={checkpoint}" + ("" if weights == "ema" else f" weights={weights}")
