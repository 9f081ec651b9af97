"""A folder of images goes into shards as it is, but for what is broken."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import EpsImagePlugin, Image
from scripts import call, encoders, image_folder, picture, tars

from diffusion_trainer.streaming.damage import Damage, TooLarge
from diffusion_trainer.streaming.scanning import scan


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


FILES = {
    "cat/1.jpg": picture(1, format="jpeg"),
    "cat/old/2.JPEG": picture(2, format="jpeg"),
    "cat/two.dots.png": picture(3, format="png"),
    "dog/1.jpg": picture(4, format="jpeg"),
    "dog/really a png.jpg": picture(5, format="png"),
    "dog/3.webp": picture(6, format="webp"),
    "ewe/ünïcode.png": picture(7, mode="L", format="png"),
    "ewe/cmyk.jpg": picture(8, mode="CMYK", format="jpeg"),
    "ewe/notes.txt": b"no image",
    "ewe/.hidden.jpg": b"no image",
}


@pytest.fixture
def photos(tmp_path) -> Path:
    return fill(tmp_path / "photos", FILES)


def recipe(monkeypatch, photos: Path, *arguments: object) -> int:
    return call(image_folder, monkeypatch, photos, "--out", photos.parent / "out", "--processes", 1, *arguments)


def read(folder: Path, name: str = "train") -> dict[str, dict]:
    """Samples by the path of their file."""
    paths = [str(p) for p in sorted(folder.glob(f"{name}-*.tar"))]
    found = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in found] == sorted({s["__key__"] for s in found})
    return {json.loads(s["json"])["path"]: s for s in found}


def test_every_file_is_in_the_shards_as_it_was(photos, monkeypatch, capsys):
    assert recipe(monkeypatch, photos, "--samples-per-shard", 3) == 0
    assert "8 images, 1 other files" in capsys.readouterr().out
    found = read(photos.parent / "out")
    extensions = {**dict.fromkeys(FILES, "jpg"), "dog/3.webp": "webp"}
    extensions |= dict.fromkeys(("cat/two.dots.png", "dog/really a png.jpg", "ewe/ünïcode.png"), "png")
    assert {path: sample[extensions[path]] for path, sample in found.items()} == {
        path: data for path, data in FILES.items() if b"no image" not in data
    }
    classes = json.loads((photos.parent / "out" / "classes.json").read_text())
    assert classes == ["cat", "dog", "ewe"]
    assert all(classes[int(sample["cls"])] == path.split("/")[0] for path, sample in found.items())
    assert [scan(p).fields.total() for p in sorted((photos.parent / "out").glob("*.tar"))] == [3, 3, 2]


def test_the_order_is_shuffled_by_the_seed_alone(tmp_path, monkeypatch):
    files = {f"{c}/{i:02d}.png": picture(10 * ord(c) + i, (4, 4), format="png") for c in "ab" for i in range(10)}
    photos = fill(tmp_path / "photos", files)
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert recipe(monkeypatch, photos, "--name", name, "--seed", seed) == 0
    orders = [list(read(tmp_path / "out", name)) for name in ("one", "two", "three")]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(files)
    assert 2 <= sum(path[0] == "a" for path in orders[0][:10]) <= 8


BROKEN = {
    "cat/cut.jpg": FILES["cat/1.jpg"][:-200],
    "dog/cut.png": FILES["dog/really a png.jpg"][:300],
    "dog/empty.jpg": b"",
    "dog/web page.jpg": b"<html>404</html>",
    "ewe/flipped.png": FILES["ewe/ünïcode.png"][:60] + b"\xff\xff\xff" + FILES["ewe/ünïcode.png"][63:],
    "ewe/bomb.png": None,
}


def bomb() -> bytes:
    """A PNG of a few bytes whose header says 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def test_broken_images_are_left_out_and_listed(photos, monkeypatch, capsys):
    fill(photos, {path: data if data is not None else bomb() for path, data in BROKEN.items()})
    assert recipe(monkeypatch, photos, "--samples-per-shard", 4) == 0
    said = capsys.readouterr().err
    assert "6 items were left out" in said
    assert all(f"left out: {path}: " in said for path in BROKEN)
    assert set(read(photos.parent / "out")) == {path for path, data in FILES.items() if b"no image" not in data}
    listed = json.loads((photos.parent / "out" / "train.json").read_text())["skipped"]
    assert sorted(line.split(":")[0] for line in listed) == sorted(BROKEN)


def test_strict_stops_at_a_broken_image(photos, monkeypatch, capsys):
    fill(photos, {"dog/empty.jpg": b""})
    assert recipe(monkeypatch, photos, "--strict") == 2
    assert "dog/empty.jpg: " in capsys.readouterr().err
    assert not tars(photos.parent / "out")
    assert recipe(monkeypatch, photos) == 0  # and without it the same command goes on
    assert len(read(photos.parent / "out")) == 8


def test_max_side_changes_only_what_is_larger(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    small = picture(1, (20, 30), format="jpeg")
    palette, clear = picture(4, (64, 48), mode="P", format="png"), picture(5, (64, 48), mode="RGBA", format="png")
    photos = fill(tmp_path / "photos", {
        "a/small.jpg": small, "a/large.jpg": picture(2, (200, 100), format="jpeg"), "a/palette.png": palette,
        "a/turned.jpg": picture(3, (200, 100), format="jpeg", exif=exif), "a/clear.png": clear,
        "a/cmyk.jpg": picture(6, (90, 90), mode="CMYK", format="jpeg"),
        "a/web.webp": picture(7, (90, 90), format="webp"),
    })  # fmt: skip
    assert recipe(monkeypatch, photos, "--max-side", 32) == 0
    found = read(tmp_path / "out")
    assert found["a/small.jpg"]["jpg"] == small
    shapes = {
        path: Image.open(io.BytesIO(s.get("jpg") or s["png"])) for path, s in found.items() if path != "a/small.jpg"
    }
    assert {path: (i.size, i.mode, i.format) for path, i in shapes.items()} == {
        "a/large.jpg": ((32, 16), "RGB", "JPEG"), "a/turned.jpg": ((16, 32), "RGB", "JPEG"),
        "a/palette.png": ((32, 24), "RGB", "PNG"), "a/clear.png": ((32, 24), "RGBA", "PNG"),
        "a/cmyk.jpg": ((32, 32), "RGB", "JPEG"), "a/web.webp": ((32, 32), "RGB", "PNG"),
    }  # fmt: skip
    whole = Image.open(io.BytesIO(picture(2, (200, 100), format="jpeg"))).convert("L")
    expected = np.asarray(whole.resize((32, 16), Image.Resampling.LANCZOS), float)
    assert np.abs(np.asarray(shapes["a/large.jpg"].convert("L"), float) - expected).mean() < 3


def test_formats_that_readers_do_not_know_become_png(tmp_path, monkeypatch):
    kinds = {"a/1.bmp": "bmp", "a/2.gif": "gif", "a/3.tiff": "tiff"}
    photos = fill(tmp_path / "photos", {path: picture(1, format=kind) for path, kind in kinds.items()})
    assert recipe(monkeypatch, photos) == 0
    for path, sample in read(tmp_path / "out").items():
        ours = Image.open(io.BytesIO(sample["png"]))
        theirs = Image.open(photos / path).convert("RGB")
        assert ours.format == "PNG"
        np.testing.assert_array_equal(np.asarray(ours.convert("RGB")), np.asarray(theirs))


def test_without_classes(tmp_path, monkeypatch, capsys):
    photos = fill(tmp_path / "photos", {"1.jpg": FILES["cat/1.jpg"], "deep/er/2.jpg": FILES["dog/1.jpg"]})
    assert recipe(monkeypatch, photos) == 2
    assert "1.jpg lies in no sub-folder, so it has no class; take all without: --no-classes" in capsys.readouterr().err
    assert recipe(monkeypatch, photos, "--no-classes") == 0
    found = read(tmp_path / "out")
    assert set(found) == {"1.jpg", "deep/er/2.jpg"}
    assert all("cls" not in sample for sample in found.values())
    assert not (tmp_path / "out" / "classes.json").exists()


def test_a_second_set_numbers_the_classes_as_the_first(photos, monkeypatch, capsys):
    assert recipe(monkeypatch, photos) == 0
    held = fill(photos.parent / "held", {"ewe/9.jpg": FILES["dog/1.jpg"]})
    assert recipe(monkeypatch, held, "--name", "heldout") == 0
    assert int(read(photos.parent / "out", "heldout")["ewe/9.jpg"]["cls"]) == 2
    fill(held, {"fox/1.jpg": FILES["dog/1.jpg"]})
    assert recipe(monkeypatch, held, "--name", "more") == 2
    assert "does not have fox" in capsys.readouterr().err


def test_a_folder_that_changed_is_another_set(photos, monkeypatch, capsys):
    assert recipe(monkeypatch, photos) == 0
    before = tars(photos.parent / "out")
    assert recipe(monkeypatch, photos) == 0
    assert "has all of train already" in capsys.readouterr().out
    fill(photos, {"cat/new.jpg": FILES["cat/1.jpg"]})
    assert recipe(monkeypatch, photos) == 2
    assert "images was 8, is 9" in capsys.readouterr().err
    assert tars(photos.parent / "out") == before


@pytest.mark.parametrize(("folder", "complaint"), [("nowhere", "is no folder"), ("empty", "no file below it is an im")])
def test_nothing_to_do(tmp_path, monkeypatch, capsys, folder, complaint):
    (tmp_path / "empty").mkdir()
    assert recipe(monkeypatch, tmp_path / folder) == 2
    assert complaint in capsys.readouterr().err


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
READ = {"JPEG", "MPO", "PNG", "APNG", "WEBP", "BMP", "DIB", "GIF", "TIFF"}


def test_a_strangers_postscript_is_not_run(monkeypatch):
    """Pillow starts Ghostscript where it takes an image for EPS, whatever the name of its file."""

    def ran(*arguments, **named):
        raise AssertionError

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ran)
    with pytest.raises(AssertionError):  # so it would be seen
        Image.open(io.BytesIO(EPS)).load()
    for decode in (lambda: image_folder.member(EPS, None, 95), lambda: encoders.pixels(EPS, None)):
        with pytest.raises(Damage, match="it is no JPEG, P"):
            decode()


def test_an_encoder_gets_no_bomb(monkeypatch):
    """Pillow's own limit is not asked of JPEGs, which it does not decode here."""
    monkeypatch.setattr(encoders, "MAX_PIXELS", 20 * 30)
    assert encoders.pixels(FILES["cat/1.jpg"], None).shape == (30, 20, 3)
    monkeypatch.setattr(encoders, "MAX_PIXELS", 20 * 30 - 1)
    with pytest.raises(TooLarge):
        encoders.pixels(FILES["cat/1.jpg"], None)


def test_the_list_of_formats_is_closed():
    """Of all that Pillow writes, and would read again."""
    Image.init()
    found = set()
    for kind in sorted(Image.SAVE.keys() & Image.OPEN.keys()):
        file = io.BytesIO()
        try:
            Image.new("RGB", (16, 16)).save(file, kind)
        except (OSError, ValueError, KeyError, AttributeError):
            continue  # it has no such pixels, or no library for them
        try:
            image_folder.member(file.getvalue(), None, 95)
        except Damage:
            continue
        found.add(kind)
    assert {"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"} <= found <= READ


RAMP = (np.arange(48 * 64).reshape(48, 64) * 21).astype(np.uint16)  # 0 to 64491


def deep(pixels: np.ndarray, **save) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **save)
    return file.getvalue()


def test_of_16_bits_the_upper_ones_are_kept_as_in_training():
    png = deep(RAMP, format="png")
    np.testing.assert_array_equal(encoders.pixels(png, None), np.repeat((RAMP >> 8)[..., None], 3, axis=2))
    for bits in ("<u2", ">u2"):
        kind, data = image_folder.member(deep(RAMP.astype(bits), format="tiff"), None, 95)
        assert kind == "png"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), RAMP >> 8)
    small = np.asarray(Image.open(io.BytesIO(image_folder.member(png, 32, 95)[1])), float)
    assert np.abs(small - RAMP.reshape(24, 2, 32, 2).mean((1, 3)) / 256).max() < 2
    assert image_folder.member(png, 64, 95) == ("png", png)


def test_a_16_bit_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = Image.open(io.BytesIO(image_folder.member(deep(RAMP, format="png", exif=exif), 32, 95)[1]))
    assert turned.size == (24, 32)
    assert np.asarray(turned)[0].mean() == pytest.approx(np.asarray(turned)[-1].mean(), abs=8)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_no_known_range_are_left_out(kind):
    with pytest.raises(Damage, match="does not say what is white"):
        image_folder.member(deep(RAMP.astype(kind), format="tiff"), None, 95)


def test_links_back_to_a_folder_that_they_lie_in_end(tmp_path):
    photos = fill(
        tmp_path / "photos", {"cat/1.jpg": b"", "cat/old/2.jpg": b"", "cat/.old/3.jpg": b"", "dog/a.txt": b""}
    )
    other = fill(tmp_path / "other", {"4.jpg": b""})
    (photos / "cat" / "latest").symlink_to(".")
    (photos / "cat" / "old" / "up").symlink_to("..")
    (photos / "dog" / "elsewhere").symlink_to(other)
    (other / "back").symlink_to(photos)  # by way of a folder that is not below
    (photos / "kitten").symlink_to("cat")  # as another class
    below = ["cat/1.jpg", "cat/old/2.jpg"]
    expected = [*below, "dog/elsewhere/4.jpg", "kitten/1.jpg", "kitten/old/2.jpg"]
    assert image_folder.listing(photos) == (expected, 1)


def test_what_is_no_file_is_left_out_and_said(tmp_path, capsys):
    photos = fill(tmp_path / "photos", {"cat/1.jpg": b""})
    (photos / "cat" / "2.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(photos / "cat" / "\x1b[2J.jpg")  # to open it would be to wait
    assert image_folder.listing(photos) == (["cat/1.jpg"], 2)
    said = capsys.readouterr().err
    assert "left out: cat/2.jpg: it is no file, or a link to none" in said
    assert "left out: cat/\\x1b[2J.jpg: it is no file" in said


@pytest.mark.parametrize("max_side", [None, 8])
def test_what_takes_training_too_long_is_left_out(max_side):
    plain = picture(1, mode="L", format="jpeg", progressive=True)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" + bytes(2)
    with pytest.raises(Damage, match="more than 100 scans"):
        image_folder.member(plain[:-2] + scan * 100 + plain[-2:], max_side, 95)


@pytest.mark.parametrize("same", ["size", "time"])
def test_a_mended_picture_makes_another_set(photos, monkeypatch, capsys, same):
    whole = FILES["cat/1.jpg"]
    broken = photos / "cat" / "1.jpg"
    broken.write_bytes(bytes(len(whole)) if same == "size" else whole[:100])
    before = broken.stat()
    assert recipe(monkeypatch, photos) == 0
    shards = tars(photos.parent / "out")
    assert recipe(monkeypatch, photos) == 0
    assert "has all of train already" in capsys.readouterr().out
    broken.write_bytes(whole)
    os.utime(broken, ns=(before.st_atime_ns, before.st_mtime_ns + (same == "size")))
    assert recipe(monkeypatch, photos) == 2
    assert "other settings (names, sizes and times of files was " in capsys.readouterr().err
    assert tars(photos.parent / "out") == shards
    assert recipe(monkeypatch, photos, "--name", "mended") == 0
    assert read(photos.parent / "out", "mended")["cat/1.jpg"]["jpg"] == whole


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"[1, 2]", b'[["cat"]]'])
def test_classes_that_cannot_be_read(photos, monkeypatch, capsys, data):
    names = photos.parent / "out" / "classes.json"
    fill(names.parent, {names.name: data})
    assert recipe(monkeypatch, photos) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{names} " in said
    assert "remove it, and the sets beside it" in said
