"""One safetensors file of a checkpoint's weights, however many ranks wrote them: streamed, some megabytes at a time.

Needs no process group, no model and no device.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.checkpoint_files import header, sync
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint
from diffusion_trainer.training.ema import KEY

CHUNK = 1 << 18  # elements that are in memory at once; what the allocator keeps is some eight times as much, 8 MB


def kinds_of(checkpoint: Checkpoint) -> list[str]:
    """What a model can be made of: the trained weights and their averages, but none of the optimizer's moments."""
    return sorted(kind for kind in checkpoint.kinds if kind == WEIGHT or kind.startswith(KEY))


def consolidate(checkpoint: Checkpoint, kind: str, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> int:
    """Writes every trained parameter in its shape and under its name, and waits for the disk; the file's bytes.

    fp32 is bitwise `checkpoint.whole(kind)`. UserError if the checkpoint does not hold it all or a number is too large
    for dtype; OSError if the file cannot be written.
    """
    with path.open("wb") as file:
        file.write(header({name: (dtype, shape) for name, shape in checkpoint.shapes.items()}, metadata))
        for name, shape in checkpoint.shapes.items():
            for run in _runs(checkpoint, kind, name, shape.numel()):
                file.write(_narrowed(run, dtype, name).view(torch.uint8).numpy())
        size = file.tell()
    sync(path)
    return size


def _runs(checkpoint: Checkpoint, kind: str, name: str, count: int) -> Iterator[Tensor]:
    for first in range(0, count, CHUNK):
        yield checkpoint.read(kind, name, first, min(CHUNK, count - first))


def _narrowed(run: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    narrow = run.to(dtype)
    if not torch.equal(narrow.isfinite(), run.isfinite()):
        raise UserError(f"{name} has a number beyond {torch.finfo(dtype).max:.4g}, the largest of {dtype}: use fp32")
    return narrow
