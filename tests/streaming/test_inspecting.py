"""What `inspect` finds of shards: which there are, which are damaged, and a look into some."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from streaming.pictures import png

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.index import INDEX, Shard, write_index
from diffusion_trainer.streaming.inspecting import WHOLE, examine, find, look
from diffusion_trainer.streaming.stores import LocalStore
from diffusion_trainer.streaming.writer import write_shards

COUNT, PER_SHARD = 30, 10


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    samples = ({"__key__": f"{i:03d}", "png": png(i), "cls": b"%d" % (i % 5)} for i in range(COUNT))
    write_shards(samples, folder, "a", PER_SHARD)
    return folder


@pytest.fixture
def shards(written, tmp_path) -> Path:
    """A folder with three shards of ten samples and their index, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "shards"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def offsets(path: Path) -> np.ndarray:
    return np.frombuffer(Path(f"{path}.idx").read_bytes(), "<u8")


def end(path: Path) -> int:
    return int(offsets(path)[-1])


def back(path: Path) -> None:
    path.write_bytes(np.frombuffer(path.read_bytes(), "<u8")[::-1].tobytes())


def rewrite_index(folder: Path, **changed) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["shardlist"][1] |= changed
    (folder / INDEX).write_text(json.dumps(index))


def found(folder: Path, verify: bool = True) -> list[tuple[str, str, int]]:
    contents = [examine(listed, verify) for listed in find(f"{folder}/*.tar")]
    return [(f.kind, Path(f.shard).name, f.sample) for c in contents for f in c.found]


def test_a_pattern_names_what_is_there_and_what_the_index_has(shards):
    (shards / "a-000001.tar").unlink()
    shutil.copy(shards / "a-000000.tar", shards / "b.tar")
    (shards / ".hidden.tar").write_bytes(b"")
    (shards / "folder.tar").mkdir()
    every = [("a-000000.tar", 10), ("a-000001.tar", 10), ("a-000002.tar", 10), ("b.tar", None)]
    for pattern in ("*.tar", "*", "{a-*,b}.tar", ""):
        names = [(listed.path.name, listed.shard and listed.shard.samples) for listed in find(f"{shards}/{pattern}")]
        assert names == every, pattern
    assert [listed.path.name for listed in find(f"{shards}/a-{{000001..000002}}.tar")] == [
        "a-000001.tar",
        "a-000002.tar",
    ]
    assert find(f"{shards}/{INDEX}") == find(f"{shards}")


def test_a_folder_is_listed_once_however_many_of_its_shards_are_named(tmp_path, monkeypatch):
    for k in range(100):
        (tmp_path / f"x-{k:02d}.tar").touch()
    write_index(tmp_path, [Shard(f"x-{k:02d}.tar", 0, 0, 0) for k in range(100)])
    listed = []
    everything = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or everything(path))
    for search in (find, LocalStore().find):
        assert len(search(f"{tmp_path}/x-{{00..99}}.tar")) == 100
        assert listed == [tmp_path]
        listed.clear()


@pytest.mark.parametrize(
    "pattern", ["none-*.tar", "no/such/*.tar", "a{0..", "s3://a/b.tar", "pipe:cat b.tar", "n" * 300, ""]
)
def test_a_pattern_without_shards_is_refused_by_name(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no file matches|is no local path|cannot be read"):
        find(pattern)


def test_what_is_whole_is_found_whole(shards):
    assert found(shards) == []
    assert found(shards, verify=False) == []


DAMAGE = {
    "a sample's bits": (lambda f: flip(f, int(offsets(f)[3]) + 600), [("checksum", 3)]),
    "two samples' bits": (lambda f: [flip(f, at) for at in (600, end(f) - 1)], [("checksum", 0), ("checksum", 9)]),
    "bits behind the samples": (lambda f: flip(f, end(f) + 5), [("checksum", WHOLE)]),
    "cut within a sample": (lambda f: cut(f, int(offsets(f)[8]) + 1), [("truncated", 8), ("truncated", 9)]),
    "cut between samples": (lambda f: cut(f, int(offsets(f)[9])), [("truncated", 9)]),
    "cut end mark": (lambda f: cut(f, end(f)), [("truncated", WHOLE)]),
    "emptied": (lambda f: cut(f, 0), [("truncated", i) for i in range(10)]),
    "missing": (lambda f: f.unlink(), [("missing_shard", WHOLE)]),
    "grown": (lambda f: f.write_bytes(f.read_bytes() + bytes(512)), [("wrong_index", WHOLE)]),
    "no offsets": (lambda f: Path(f"{f}.idx").unlink(), [("wrong_index", WHOLE)]),
    "no checksums": (lambda f: Path(f"{f}.crc").unlink(), [("wrong_index", WHOLE)]),
    "short offsets": (lambda f: cut(Path(f"{f}.idx"), 80), [("wrong_index", WHOLE)]),
    "an end outside": (lambda f: flip(Path(f"{f}.idx"), 8 * 10 + 2), [("wrong_index", WHOLE)]),
    "offsets outside": (lambda f: flip(Path(f"{f}.idx"), 8 * 5 + 2), [("wrong_index", WHOLE)]),
    "offsets that go back": (lambda f: back(Path(f"{f}.idx")), [("wrong_index", WHOLE)]),
    "another count": (lambda f: rewrite_index(f.parent, nsamples=9), [("wrong_index", WHOLE)]),
    "another checksum": (lambda f: rewrite_index(f.parent, crc32=1), [("checksum", WHOLE)]),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_verifying_finds_each_damaged_sample_and_no_other(what, shards):
    do, expected = DAMAGE[what]
    do(shards / "a-000001.tar")
    assert found(shards) == [(kind, "a-000001.tar", sample) for kind, sample in expected]


def test_without_verifying_sizes_are_compared(shards):
    flip(shards / "a-000000.tar", 600)
    cut(shards / "a-000001.tar", 3000)
    (shards / "a-000002.tar").unlink()
    assert found(shards, verify=False) == [
        ("truncated", "a-000001.tar", WHOLE),
        ("missing_shard", "a-000002.tar", WHOLE),
    ]


def test_shards_without_index_are_scanned(shards):
    whole, broken, none = (shards / name for name in ("a-000000.tar", "a-000001.tar", "x.tar"))
    seventh = int(offsets(broken)[7])
    for name in (INDEX, "a-000000.tar.idx", "a-000001.tar.crc"):
        (shards / name).unlink()
    cut(broken, seventh + 100)
    (shards / "a-000002.tar").unlink()
    none.write_bytes(b"<html>" * 200)
    contents = [examine(listed, False) for listed in find(f"{shards}/*.tar")]
    assert [(c.shard.url, c.shard.samples, c.scan is None) for c in contents] == [
        (str(whole), 10, False), (str(broken), 6, False), (str(none), 0, False)
    ]  # fmt: skip
    assert found(shards) == [("truncated", "a-000001.tar", 6), ("archive", "x.tar", 0)]
    survey = look(contents, None, 5)
    assert survey.looked_at == 16
    assert survey.found == []
    assert survey.members["cls"].values == {"0": 4, "1": 3, "2": 3, "3": 3, "4": 3}


def test_a_look_is_spread_over_the_shards_and_reads_as_many_as_were_asked(shards):
    contents = [examine(listed, False) for listed in find(f"{shards}/*.tar")]
    survey = look(contents, 6, 3)
    assert survey.looked_at == 6
    assert [np.asarray(p)[0, 0, 0] for p in look(contents, 6, 6).pictures] == [2, 7, 12, 17, 22, 27]
    assert [np.asarray(p)[0, 0, 0] for p in survey.pictures] == [7, 17, 27]
    assert {e: (len(m.sizes), dict(m.shapes)) for e, m in survey.members.items()} == {
        "png": (6, {"4 x 6 grey PNG": 6}), "cls": (6, {"label": 6})
    }  # fmt: skip
    assert survey.members["cls"].values == {"2": 6}  # of 2, 7, 12, ... modulo 5
    assert survey.seconds > 0
    every = look(contents, None, 100)
    assert (every.looked_at, len(every.pictures)) == (30, 30)
    assert look(contents, 1, 1).looked_at == 1
    assert look([], 5, 5).looked_at == 0


def test_large_pictures_are_kept_small(tmp_path):
    write_shards([{"__key__": "1", "png": png(9, (700, 1400))}], tmp_path, "a", 1)
    (picture,) = look([examine(listed, False) for listed in find(str(tmp_path))], None, 9).pictures
    assert picture.size == (128, 64)
    assert (np.asarray(picture) == 9).all()


def test_a_look_finds_what_training_would(shards):
    flip(shards / "a-000000.tar", int(offsets(shards / "a-000000.tar")[4]) + 600)
    cut(shards / "a-000001.tar", int(offsets(shards / "a-000001.tar")[8]))
    cut(Path(shards / "a-000002.tar.crc"), 36)
    survey = look([examine(listed, False) for listed in find(f"{shards}/*.tar")], None, 0)
    assert [(f.kind, Path(f.shard).name, f.sample) for f in survey.found] == [
        ("checksum", "a-000000.tar", 4), ("truncated", "a-000001.tar", 8), ("truncated", "a-000001.tar", 9),
        ("wrong_index", "a-000002.tar", WHOLE)
    ]  # fmt: skip


def test_undecodable_members_are_named(tmp_path):
    broken = {2: {"png": png()[:-20]}, 5: {"cls": b"five"}, 7: {"json": b"{"}}
    samples = ({"__key__": f"{i}", "png": png(), "cls": b"1", "json": b"{}", **broken.get(i, {})} for i in range(10))
    write_shards(samples, tmp_path, "a", 10)
    survey = look([examine(listed, True) for listed in find(str(tmp_path))], None, 0)
    assert [(f.kind, f.sample) for f in survey.found] == [("undecodable", i) for i in (2, 5, 7)]
    assert [f.message.split(":")[0] for f in survey.found] == [".png", ".cls", ".json"]


def test_only_files_of_the_folder_are_read(tmp_path):
    """An index is data: whatever url it has, nothing outside its folder is opened."""
    write_shards([{"__key__": "1", "cls": b"1"}], tmp_path / "shards", "a", 1)
    write_shards([{"__key__": "1", "cls": b"1"}], tmp_path / "secret", "b", 1)
    index = tmp_path / "shards" / INDEX
    index.write_text(index.read_text().replace("a-000000.tar", "../secret/b-000000.tar"))
    with pytest.raises(UserError, match="not beside it"):
        find(f"{tmp_path}/shards/*.tar")


def test_another_shard_of_the_same_size_is_told_once_and_the_others_are_looked_at(shards):
    shutil.copy(shards / "a-000002.tar", shards / "a-000001.tar")
    survey = look([examine(listed, False) for listed in find(str(shards))], None, 0)
    assert [(f.kind, Path(f.shard).name, f.sample) for f in survey.found] == [("wrong_index", "a-000001.tar", WHOLE)]
    assert survey.members["cls"].sizes == [1] * 20
