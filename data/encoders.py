"""Frozen networks that data/encode_latents.py calls, and the arrays that it writes."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.decoding import picture_of

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # what Pillow refuses, whoever decodes the image


class Encoder:
    """A TorchScript file, on a device."""

    def __init__(self, path: Path, device: torch.device):
        """UserError if there is none."""
        self.path, self.device = path, device
        try:
            self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            self.net: nn.Module = torch.jit.load(str(path), map_location=device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} is no TorchScript file: {_last_line(error)}") from error
        self.dtype = next((p.dtype for p in self.net.parameters()), torch.float32)

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 -> (B, c, h, w) float32."""
        x = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self._call(x.to(self.dtype), len(pixels), f"images {tuple(x.shape)}")

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """B texts -> (B, ...) float32."""
        return self._call(list(texts), len(texts), f"{len(texts)} texts")

    @torch.no_grad()
    def _call(self, inputs: Tensor | list[str], size: int, what: str) -> np.ndarray:
        try:
            out = self.net(inputs)
        except RuntimeError as error:  # out of memory, too
            raise UserError(f"{self.path} fails on {what} (a smaller --batch-size?): {_last_line(error)}") from error
        if not isinstance(out, Tensor) or out.dim() < 2 or len(out) != size:
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UserError(f"{self.path} makes {found} of {what}; it should be a tensor ({size}, ...)")
        return out.float().cpu().numpy()


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def pixels(data: bytes, size: int | None) -> np.ndarray:
    """(H, W, 3) uint8 as training decodes them; with a size, the middle square, scaled to it. Damage for bad bytes."""
    whole, _ = picture_of(memoryview(data), MAX_PIXELS).pixels(3)
    return np.asarray(ImageOps.fit(Image.fromarray(whole), (size, size), Image.Resampling.LANCZOS)) if size else whole


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def place() -> tuple[int, int, torch.device]:
    """Rank, number of ranks, and this rank's device, as torchrun or srun says."""
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", 0)) > 0 and "LOCAL_RANK" not in env:
        rank, world, local_rank = (int(env[f"SLURM_{n}"]) for n in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
    else:
        rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local_rank = int(env.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        return rank, world, torch.device("cuda", local_rank % torch.cuda.device_count())
    return rank, world, torch.device("cpu")
