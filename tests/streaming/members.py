"""Members of shards that are arrays or pictures, as bytes, and what a field decodes of them."""

import io

import numpy as np
import torch
from PIL import Image as Pillow

from diffusion_trainer.streaming.fields import Field, SampleDraws

DTYPES = ["float16", "float32", "float64", "int8", "uint8", "int32", "int64", "uint16", "bool"]
SHAPE = (4, 5, 6)
LABEL = b'{"label": 3, "caption": "a \\u00e4", "tags": [1, 2.5, {"b": null}]}'


def numbers(dtype: str = "float16", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def npz(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def decoded(field: Field, data: bytes, shape: tuple[int, ...] | None = None):
    """As a batch's row and its presentation, or the object."""
    if field.stored is None:
        return field.decode(memoryview(data), None, SampleDraws(0, 0))
    batch = np.zeros((3, *(shape or field.stored)), field.dtype)
    field.decode(memoryview(data), batch[1, ...], SampleDraws(0, 0))
    assert not batch[[0, 2]].any()
    for row, damage in field.damaged(batch).items():
        assert row == 1
        raise damage
    return field.present(torch.from_numpy(batch))[1]


def encoded(picture: Pillow.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()
