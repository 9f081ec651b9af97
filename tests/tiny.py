"""A data set of a moment: ten classes of 8x8 images, in shards, and a configuration that trains on it."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_trainer.streaming.arrays import Label
from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.streaming.images import Image as ImageField
from diffusion_trainer.streaming.writer import write_shards


def samples(count: int) -> Iterator[dict]:
    """Class c has a bright bar: row c for c < 8, else the columns of one half; the rest is faint noise."""
    noise = np.random.default_rng(0)
    for i in range(count):
        pixels, label = noise.integers(0, 40, (8, 8), dtype=np.uint8), i % 10
        if label < 8:
            pixels[label] = 220
        else:
            pixels[:, (label - 8) * 4 :][:, :4] = 220
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="png")
        yield {"__key__": f"{i:04d}", "png": file.getvalue(), "cls": str(label).encode()}


def overrides(folder: Path) -> list[str]:
    """Of `train`: shards written into the folder, and nothing of the digits' own evaluation."""
    write_shards(samples(100), folder / "tiny", "train", 60)
    return [
        "experiment=digits", f"data.shards='{folder}/tiny/train-*.tar'", "evaluation=none", "logger=csv",
        "batch_size=32", "lanes=4",
    ]  # fmt: skip


def data(folder: Path) -> ShardData:
    """The shards that `overrides` has written."""
    return ShardData({"image": ImageField(1, 8, 8), "label": Label()}, f"{folder}/tiny/train-*.tar")


# Overrides of the network: some 40 thousand parameters.
NETWORK = [
    "network.base_channels=16", "network.blocks_per_level=1", "network.head_channels=16", "network.groups=4",
]  # fmt: skip
