"""Rows of parquet files go into shards in their order, but for those that cannot be used."""

import json
import os
import sys
from pathlib import Path

import pytest
import webdataset
from scripts import call, parquet_captions, picture, tars

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

IMAGES = [picture(i, (8, 8), format="png" if i % 2 else "jpeg") for i in range(23)]
CAPTIONS = [f"picture number {i}, schön" for i in range(23)]


def write_parquet(path: Path, rows: range, images: list | None = None, **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": images or [IMAGES[i] for i in rows], "caption": [CAPTIONS[i] for i in rows], **columns}
    parquet.write_table(arrow.table(table), path, row_group_size=4)


@pytest.fixture
def rows(tmp_path) -> Path:
    """23 rows: row groups of 4 in two files, an empty one between them."""
    write_parquet(tmp_path / "in" / "a.parquet", range(13), score=list(range(13)))
    write_parquet(tmp_path / "in" / "c.parquet", range(13, 23), score=list(range(13, 23)))
    empty = parquet.read_table(tmp_path / "in" / "a.parquet").slice(0, 0)
    parquet.write_table(empty, tmp_path / "in" / "b.parquet")
    return tmp_path / "in"


def recipe(monkeypatch, source: Path, *arguments: object, out: str = "out") -> int:
    common = ("--out", source.parent / out, "--processes", 1)
    return call(parquet_captions, monkeypatch, source, *common, *arguments)


def read(folder: Path) -> list[dict]:
    paths = [str(p) for p in sorted(folder.glob("train-*.tar"))]
    return list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))


@pytest.mark.parametrize("size", [1, 5, 8, 100])
def test_rows_become_samples_in_their_order(rows, monkeypatch, size):
    assert recipe(monkeypatch, rows, "--samples-per-shard", size, "--keep", "score") == 0
    found = read(rows.parent / "out")
    assert [s["__key__"] for s in found] == [f"{i:09d}" for i in range(23)]
    assert [s["png" if i % 2 else "jpg"] for i, s in enumerate(found)] == IMAGES
    assert [s["txt"].decode() for s in found] == CAPTIONS
    assert [json.loads(s["json"]) for s in found] == [{"score": i} for i in range(23)]
    assert len(list((rows.parent / "out").glob("*.tar"))) == -(-23 // size)


def test_a_row_group_is_read_once_for_all_its_shards(rows, monkeypatch):
    opened = []
    real = parquet.ParquetFile.read_row_group

    def counted(file, number, *arguments, **named):
        opened.append(number)
        return real(file, number, *arguments, **named)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    parquet_captions.table.cache_clear()
    assert recipe(monkeypatch, rows, "--samples-per-shard", 3) == 0
    assert opened == [0, 1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("kind", ["paths", "structs of bytes", "structs of paths"])
def test_images_may_be_paths_or_structs(tmp_path, monkeypatch, kind):
    for i in range(5):
        (tmp_path / "files" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / f"{i % 2}" / f"{i}.img").write_bytes(IMAGES[i])
    paths = [f"{i % 2}/{i}.img" for i in range(5)]
    images = {
        "paths": paths,
        "structs of bytes": [{"bytes": IMAGES[i], "path": "gone.jpg"} for i in range(5)],
        "structs of paths": [{"bytes": None, "path": path} for path in paths],
    }
    write_parquet(tmp_path / "in" / "a.parquet", range(5), images[kind])
    assert recipe(monkeypatch, tmp_path / "in", "--root", tmp_path / "files") == 0
    assert [s.get("png") or s["jpg"] for s in read(tmp_path / "out")] == IMAGES[:5]


def test_rows_that_cannot_be_used_are_left_out_and_listed(tmp_path, monkeypatch, capsys):
    images = [IMAGES[0], None, b"", b"<html>", IMAGES[4][:100], IMAGES[5], IMAGES[6], IMAGES[7]]
    captions = [*CAPTIONS[:5], None, "  ", CAPTIONS[7]]
    table = arrow.table({"image": images, "caption": captions})
    (tmp_path / "in").mkdir()
    parquet.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=3)
    assert recipe(monkeypatch, tmp_path / "in", "--samples-per-shard", 2) == 0
    assert [s["__key__"] for s in read(tmp_path / "out")] == ["000000000", "000000007"]
    said = capsys.readouterr().err
    assert "6 items were left out" in said
    for place, why in {
        "row 1 of row group 0": "no image", "row 2 of row group 0": "no image", "row 0 of row group 1": "it is no JPEG",
        "row 1 of row group 1": "it cannot be decoded", "row 2 of row group 1": "no caption",
        "row 0 of row group 2": "no caption",
    }.items():  # fmt: skip
        assert f"a.parquet, {place}: {why}" in said
    assert recipe(monkeypatch, tmp_path / "in", "--strict", out="strict") == 2
    assert "row 1 of row group 0: no image" in capsys.readouterr().err
    assert not tars(tmp_path / "strict")


def test_paths_do_not_lead_out_of_their_folder(tmp_path, monkeypatch, capsys):
    for name in ("in/x.png", "secret.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(IMAGES[1])
    outside = ["../secret.png", str(tmp_path / "secret.png"), "gone.png", "a\0b", "x.png", "", "x.png/y", "../\x1b[2J"]
    write_parquet(tmp_path / "in" / "a.parquet", range(8), outside)
    assert recipe(monkeypatch, tmp_path / "in", "--root", tmp_path / "in") == 0
    assert [s["__key__"] for s in read(tmp_path / "out")] == ["000000004"]
    said = capsys.readouterr().err
    assert said.count("leads out of --root") == 3
    assert "../\\x1b[2J leads" in said
    assert said.count("there is no file") == 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--image", "picture"), "a.parquet has no column picture; it has image, caption, score"),
        (("--keep", "score", "mood"), "has no column mood"),
        (("--image", "score"), "nothing could be used"),
        (("--samples-per-shard", 0), "positive whole number"),
    ],
)
def test_mistakes_exit_with_2(rows, monkeypatch, capsys, arguments, complaint):
    assert recipe(monkeypatch, rows, *arguments) == 2
    assert complaint in capsys.readouterr().err


def test_files_that_are_none(tmp_path, monkeypatch, capsys):
    assert recipe(monkeypatch, tmp_path / "nothing.parquet") == 2
    assert "no parquet file matches" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(b"<html>")
    assert recipe(monkeypatch, tmp_path / "in") == 2
    assert "a.parquet cannot be read as parquet" in capsys.readouterr().err


def test_a_damaged_file_stops_the_recipe_and_is_named(rows, monkeypatch, capsys):
    data = bytearray((rows / "c.parquet").read_bytes())
    data[40:1200] = bytes(1160)
    (rows / "c.parquet").write_bytes(data)
    parquet_captions.table.cache_clear()
    assert recipe(monkeypatch, rows, "--samples-per-shard", 5) == 2
    assert "c.parquet, row group 0, cannot be read" in capsys.readouterr().err


def test_without_pyarrow(rows, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert recipe(monkeypatch, rows) == 2
    assert "pip install 'diffusion-trainer[data]'" in capsys.readouterr().err


def test_a_file_that_was_written_anew_makes_another_set(rows, monkeypatch, capsys):
    assert recipe(monkeypatch, rows) == 0
    found = (rows / "c.parquet").stat()
    os.utime(rows / "c.parquet", ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert recipe(monkeypatch, rows) == 2
    assert "other settings (names, sizes and times of files was " in capsys.readouterr().err
