"""How `inspect` describes a member, whatever its bytes are."""

import io
import os
import pickle
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming.pictures import npy, png

from diffusion_trainer.streaming.damage import Damage, Refused, TooLarge, Undecodable
from diffusion_trainer.streaming.describing import describe
from diffusion_trainer.streaming.inspecting import examine, find, look
from diffusion_trainer.streaming.numeric import REFUSED


def jpeg(size=(16, 24)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(file, format="jpeg")
    return file.getvalue()


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    ("extension", "data", "shape", "value"),
    [
        ("png", png(size=(3, 5)), "3 x 5 grey PNG", None),
        ("left.jpg", jpeg(), "16 x 24 grey JPEG", None),
        ("latent.npy", npy(np.zeros((4, 2, 3), np.float16)), "(4, 2, 3) float16", None),
        ("npy", npy(np.zeros((0, 2))), "the npy holds an array of shape (0, 2)", None),
        ("npy", npy(np.array(["a"])), "the npy holds '<U1', neither integers nor floats", None),
        ("npy", npy(np.asfortranarray(np.ones((3, 2), ">i4"))), "(3, 2) >i4", None),
        ("npz", npz(x=np.zeros(3), y=np.ones((2, 2), bool)), "x (3,) float64, y (2, 2) bool", None),
        ("cls", b" 17\n", "label", "17"),
        ("txt", "grüße".encode(), "text", "grüße"),
        ("txt", b"a" * 5000, "text", "a" * 97 + "..."),
        ("json", b'{"a": 1, "b": [2]}', "keys a, b", '{"a": 1, "b": [2]}'),
        ("json", b"[1]", "a list", "[1]"),
        ("bin", b"\0", "bytes", None),
        ("pkl", pickle.dumps(print), "can run code: never read", None),
    ],
)
def test_a_member_is_described(extension, data, shape, value):
    found = describe(extension, memoryview(data))
    assert (found.shape, found.value) == (shape, value)
    assert (found.picture is None) == (extension[-3:] not in ("png", "jpg"))


def test_one_coloured_pixel_makes_a_picture_a_colour_one():
    pixels, file = np.zeros((20, 20, 3), np.uint8), io.BytesIO()
    pixels[3, 3, 0] = 1
    Image.fromarray(pixels).save(file, format="png")
    assert describe("png", memoryview(file.getvalue())).shape == "20 x 20 colour PNG"


class Bomb:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_nothing_runs_code(tmp_path):
    mark = tmp_path / "it ran"
    data = pickle.dumps(Bomb(mark))
    for extension in (*REFUSED, "npy", "npz", "json", "png", "cls"):
        try:
            describe(extension, memoryview(data))
        except Undecodable:
            assert extension not in REFUSED
    objects = np.array([Bomb(mark)], object)
    for extension, data in (("npy", npy(objects)), ("npz", npz(x=objects))):
        with pytest.raises(Refused, match="run the code"):
            describe(extension, memoryview(data))
    assert not mark.exists()


def bomb_png(side: int) -> bytes:
    """A header that says so many pixels."""
    data = bytearray(png())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_an_archive_of_many_arrays_is_described_by_the_first_few():
    """Each costs a look at the list of all."""
    text = describe("npz", memoryview(npz(**{f"a{k}": np.zeros(2) for k in range(2000)}))).shape
    assert text.startswith("a0 (2,) float64, a1 (2,) float64, ")
    assert text.endswith(", 1984 more")
    assert text.count("float64") == 16


def bomb_npz(size: int, count: int = 1) -> bytes:
    """Zeros, a thousandth of their size."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "xyz"[:count]:
            archive.writestr(f"{name}.npy", npy(np.zeros(size, np.uint8)))
    return file.getvalue()


def test_bombs_do_not_go_off():
    for side in (10_000, 50_000):  # Pillow itself would stop at the second
        with pytest.raises(TooLarge):
            describe("png", memoryview(bomb_png(side)))
    with pytest.raises(Undecodable):
        describe("json", memoryview(b"[" * 200_000))
    with pytest.raises(TooLarge):
        describe("txt", memoryview(bytes(1 << 27)))
    assert describe("npz", memoryview(bomb_npz(1 << 24))).shape == "x (16777216,) uint8"
    for bomb in (bomb_npz(1 << 27), bomb_npz(1 << 25, 3)):
        with pytest.raises(TooLarge):
            describe("npz", memoryview(bomb))


SEEDS = {
    "png": png(200, (9, 9)), "jpg": jpeg(), "npy": npy(np.arange(12.0).reshape(3, 4)),
    "npz": npz(x=np.arange(5), long_name=np.ones((2, 3))), "json": b'{"a": [1, 2.5, "x"], "b": null}', "cls": b"123",
    "txt": "grüße".encode(),
}  # fmt: skip


@pytest.mark.parametrize("extension", SEEDS)
def test_whatever_the_bytes_are_it_is_described_or_damage(extension):
    rng, data = np.random.default_rng(0), SEEDS[extension]
    for _ in range(400):
        changed = bytearray(data[: rng.integers(len(data) + 1)] if rng.random() < 0.3 else data)
        for at in rng.integers(0, max(1, len(changed)), rng.integers(1, 6)):
            if changed:
                changed[at] = rng.integers(256)
        try:
            describe(extension, memoryview(bytes(changed)))
        except Damage:
            continue


def test_a_tar_of_others_can_be_looked_into(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("a/é.txt", b"caption"), ("a/é.weird\x1b[31m", b"1"), ("b.npy", npy(np.zeros(3)))):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    survey = look([examine(listed, False) for listed in find(f"{tmp_path}/x.tar")], None, 1)
    assert survey.found == []
    assert {e: list(m.shapes) for e, m in survey.members.items()} == {
        "txt": ["text"], "weird\x1b[31m": ["bytes"], "npy": ["(3,) float64"]
    }  # fmt: skip
