"""Pictures that are broken, of another shape or too large: counted exactly, and replaced alike in every layout."""

import io
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from streaming.making import Number, shard_data
from streaming.test_damage_matrix import BATCH, LAYOUTS, ORDER, SAMPLES, SHARDS, STEPS, WINDOW, expected

from diffusion_trainer.streaming.images import Image
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.writer import write_shards

SIDE, TAR, HIT = 16, "x-000001.tar", 3  # of the second shard, this sample


def picture(number: int, format: str = "jpeg", side: int = SIDE) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, format)
    return file.getvalue()


def zeroed(data: bytes) -> bytes:
    """From its middle on, as a disk may leave it: of its length, and with its header."""
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def marked(data: bytes) -> bytes:
    """With a marker where only coefficients can be."""
    return data[:-100] + b"\xff\xc4" + data[-98:]


def tripping(data: bytes) -> bytes:
    """A whole PNG with an empty colour profile behind its pixels, of which Pillow says IndexError."""
    chunk = b"iCCP"
    return data[:-12] + bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[-12:]


MATRIX = {
    "a JPEG cut in its middle": ("jpg", lambda n: picture(n)[:300], "undecodable"),
    "a JPEG with zeros in its second half": ("jpg", lambda n: zeroed(picture(n)), "undecodable"),
    "a JPEG with a wrong marker": ("jpg", lambda n: marked(picture(n)), "undecodable"),
    "a JPEG that is none": ("jpg", lambda n: b"no picture", "undecodable"),
    "a PNG cut in its middle": ("png", lambda n: picture(n, "png")[:400], "undecodable"),
    "a PNG that Pillow trips over": ("png", lambda n: tripping(picture(n, "png")), "undecodable"),
    "a JPEG of another shape": ("jpg", lambda n: picture(n, side=SIDE + 1), "wrong_shape"),
    "a PNG of another shape": ("png", lambda n: picture(n, "png", side=SIDE - 8), "wrong_shape"),
    "a JPEG of too many pixels": ("jpg", lambda n: picture(n, side=4 * SIDE), "too_large"),
    "no picture": ("txt", lambda n: b"a caption", "missing_field"),
}


@pytest.mark.parametrize("name", MATRIX)
def test_a_picture_that_cannot_be_used_is_replaced_and_counted_alike_in_every_layout(tmp_path, name):
    extension, make, kind = MATRIX[name]
    samples = [{"__key__": f"{n:04d}", "jpg": picture(n), "cls": b"%d" % n} for n in range(SHARDS * SAMPLES)]
    bad = SAMPLES + HIT
    samples[bad] = {"__key__": f"{bad:04d}", extension: make(bad), "cls": b"%d" % bad}
    write_shards(iter(samples), tmp_path, "x", SAMPLES)
    fields = {"image": Image(3, SIDE, SIDE, max_pixels=(2 * SIDE) ** 2), "label": Number()}
    labels = expected({(1, HIT)}, range(BATCH * len(STEPS)))
    images = shard_data(f"{tmp_path}/*.tar", fields=fields).batch(labels)["image"]
    for world, micro_batches, workers in LAYOUTS:
        data = shard_data(f"{tmp_path}/*.tar", fields=fields, window=WINDOW, num_workers=workers, prefetch=1)
        found, count = Counter(), world * micro_batches
        for rank in range(world):
            layout = Layout(BATCH, world, rank, micro_batches)
            for piece in data.loader(layout, ORDER["seed"], ORDER["lanes"], STEPS.start, STEPS.stop):
                rows = slice(piece["first"], (piece["first"] // BATCH + 1) * BATCH, count)
                assert piece["label"].tolist() == labels[rows]
                assert (piece["image"] == images[rows]).all()
                found.update((f.kind, Path(f.shard).name, f.sample) for f in piece["damage"])
        assert found == {(kind, TAR, HIT): 2}  # two epochs
