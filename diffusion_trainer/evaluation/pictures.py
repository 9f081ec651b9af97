"""Grids of samples as PNG files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_trainer.evaluation.writing import whole

METRIC = "eval/samples"  # what loggers call them
END = b"IEND\xaeB`\x82"  # of a PNG file: the last chunk, which is empty, and its checksum


def grid(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """images: (N, C, H, W) uint8, C 1 or 3, row by row; each pixel becomes scale x scale, one pixel lies between."""
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = torch.full((c, rows * (h + 1) - 1, columns * (w + 1) - 1), 64, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (h + 1), i % columns * (w + 1)
        canvas[:, y : y + h, x : x + w] = image
    pixels = canvas.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if c == 1 else np.ascontiguousarray(pixels))


def scale_for(height: int) -> int:
    """Small images are enlarged to about 32 pixels, so that a person can see them."""
    return max(1, 32 // height)


def of_evaluation(run: Path, images_seen: int) -> Path:
    return run / "samples" / f"images-{images_seen:012d}.png"


def of_evaluations(run: Path) -> Iterator[tuple[int, Path]]:
    """Images seen and file of each evaluation's picture in the run's folder, in order."""
    for path in sorted((run / "samples").glob("images-*.png")):
        if (images_seen := path.stem.removeprefix("images-")).isdecimal():
            yield int(images_seen), path


def readable(path: Path) -> bool:
    """Whether it is the whole picture that was written: a power cut leaves files that are short, or zeros."""
    if not path.read_bytes().endswith(END):
        return False
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()  # the checksum of each chunk: a decoder takes zeros for the rest of a picture
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for a file that is none
        return False
    return True


def save(picture: Image.Image, path: Path) -> None:
    with whole(path) as part:
        picture.save(part, format="png")
