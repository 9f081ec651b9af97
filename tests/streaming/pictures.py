"""Members of shards, for the tests of what shows them."""

import io

import numpy as np
from PIL import Image


def png(value: int = 0, size: tuple[int, int] = (4, 6)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full(size, value, np.uint8)).save(file, format="png")
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()
