"""Bytes to arrays: a closed list of formats, none of which can run code."""

import io
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

IMAGES = ("png", "jpg", "jpeg", "webp")
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name


def image(data: bytes, channels: int) -> np.ndarray:
    """(channels, H, W) uint8. Raises OSError or ValueError for what is not an image."""
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert(MODES[channels]))
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def label(data: bytes) -> np.ndarray:
    """() int64 from decimal digits."""
    return np.asarray(int(data), np.int64)


LABELS: Mapping[str, Callable[[bytes], np.ndarray]] = {"cls": label}
