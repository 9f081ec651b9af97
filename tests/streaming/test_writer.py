"""Shards appear complete or not at all, and their bytes do not tell how they were written."""

import json
import os
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
import pytest
import webdataset

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming import recipes, writer
from diffusion_trainer.streaming.index import Shard, read_index
from diffusion_trainer.streaming.recipes import Job, Recipe, Skip
from diffusion_trainer.streaming.scanning import scan
from diffusion_trainer.streaming.writer import publish, write_shard, write_shards
from diffusion_trainer.streaming.writing import write


def samples(n: int, first: int = 0) -> list[dict]:
    return [
        {"__key__": f"{i:04d}", "bin": bytes([i % 256]) * (i % 700), "cls": b"%d" % i} for i in range(first, first + n)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shown(folder: Path) -> list[str]:
    """Files that are not hidden."""
    return [p.name for p in folder.iterdir() if not p.name.startswith(".")]


def index_is_true(folder: Path) -> list[Shard]:
    """What the index says holds for the files; returns its shards."""
    shards = read_index(folder / "index.json") if (folder / "index.json").exists() else []
    for shard in shards:
        found = scan(folder / shard.url)
        assert found.damage is None
        assert found.shard(shard.url) == shard
        assert (folder / f"{shard.url}.idx").read_bytes() == found.offsets.tobytes()
        assert (folder / f"{shard.url}.crc").read_bytes() == found.checksums.tobytes()
    return shards


def read(paths: list[Path]) -> list[tuple[str, bytes]]:
    found = webdataset.WebDataset([str(p) for p in paths], shardshuffle=False, empty_check=False)
    return [(s["__key__"], s["cls"], s["bin"]) for s in found]


@pytest.mark.parametrize(("count", "sizes"), [(50, [20, 20, 10]), (40, [20, 20]), (1, [1]), (0, [0])])
def test_shards_hold_what_was_given_and_everybody_can_read_them(tmp_path, count, sizes):
    paths = write_shards(iter(samples(count)), tmp_path, "x", 20)
    assert [s.samples for s in index_is_true(tmp_path)] == sizes
    assert [p.name for p in paths] == [f"x-{k:06d}.tar" for k in range(len(sizes))]
    assert read(paths) == [(s["__key__"], s["cls"], s["bin"]) for s in samples(count)]
    with tarfile.open(paths[0]) as tar:
        listed = tar.getmembers()
        assert [m.name for m in listed] == [f"{i:04d}.{e}" for i in range(sizes[0]) for e in ("bin", "cls")]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in listed} <= {(0, 0, 0, "", "")}
        assert all(tar.extractfile(m).read() == samples(50)[int(m.name[:4])][m.name[5:]] for m in listed)


def test_a_set_replaces_that_of_its_name_and_no_other(tmp_path):
    for name, count in (("train", 50), ("train-large", 30), ("trains", 5)):
        write_shards(samples(count), tmp_path, name, 20)
    others = {n: d for n, d in contents(tmp_path).items() if not n.startswith("train-0") and n != "index.json"}
    write_shards(samples(7, first=3), tmp_path, "train", 20)
    assert {s.url: s.samples for s in index_is_true(tmp_path)} == {
        "train-000000.tar": 7, "train-large-000000.tar": 20, "train-large-000001.tar": 10, "trains-000000.tar": 5
    }  # fmt: skip
    assert set(contents(tmp_path)) == {*others, "index.json", *(f"train-000000.tar{s}" for s in ("", ".idx", ".crc"))}
    assert {n: d for n, d in contents(tmp_path).items() if n in others} == others


def test_writing_again_gives_the_same_bytes(tmp_path):
    write_shards(samples(50), tmp_path / "a", "x", 20)
    before = contents(tmp_path / "a")
    write_shards(samples(50), tmp_path / "a", "x", 20)
    write_shards(samples(50), tmp_path / "b" / "c%d", "x", 20)
    assert contents(tmp_path / "a") == contents(tmp_path / "b" / "c%d") == before


def test_samples_that_end_in_an_error_leave_the_old_set(tmp_path):
    write_shards(samples(30), tmp_path, "x", 20)
    before = contents(tmp_path)

    def broken() -> Iterator[dict]:
        yield from samples(45)
        raise RuntimeError("the source is ill")

    with pytest.raises(RuntimeError, match="ill"):
        write_shards(broken(), tmp_path, "x", 20)
    assert {n: d for n, d in contents(tmp_path).items() if not n.startswith(".")} == before
    write_shards(samples(30), tmp_path, "x", 20)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("keys", [["a", "b", "a"], ["a", "a"], [".a"], ["__a"]])
def test_samples_that_readers_would_not_see_are_refused(tmp_path, keys):
    with pytest.raises(ValueError, match="can be read"):
        write_shard(tmp_path / "x.tar", ({"__key__": key, "cls": b"1"} for key in keys))
    assert not list(tmp_path.iterdir())


class Killed(Exception):
    """In place of a power cut."""


def staged(folder: Path, count: int) -> tuple[list[Shard], Path]:
    part = writer.staging(folder, "x")
    part.mkdir(parents=True, exist_ok=True)
    return [write_shard(part / writer.shard_name("x", k), samples(4, first=4 * k)) for k in range(count)], part


@pytest.mark.slow
@pytest.mark.parametrize("old", [0, 2, 5])
def test_publishing_may_be_cut_off_anywhere(tmp_path, monkeypatch, old):
    """At every change of the disk in turn: what is listed then is true, and once more makes it whole."""
    for cut in range(100):
        folder = tmp_path / str(cut)
        write_shards(samples(3), folder, "other", 2)
        if old:
            write_shards(samples(2 * old, first=100), folder, "x", 2)
        shards, part = staged(folder, 3)
        calls = iter(range(cut))

        def dying(real, calls=calls):
            def call(*arguments, **named):
                if next(calls, None) is None:
                    raise Killed
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            try:
                publish(shards, part, folder, "x")
                finished = True
            except Killed:
                finished = False
        assert {s.url for s in index_is_true(folder)} >= {"other-000000.tar", "other-000001.tar"}
        publish(shards, part, folder, "x")
        assert [s for s in index_is_true(folder) if s.url.startswith("x")] == shards
        assert sum(file.startswith("x-") and file.endswith(".tar") for file in os.listdir(folder)) == 3
        if finished:
            assert cut > 9  # three files for each of three shards, at least
            return
    raise AssertionError("it never finished")


@dataclass(frozen=True)
class Numbers(Recipe):
    """Ten shards of four; what is divisible by `bad` cannot be used."""

    bad: int = 1000
    deadly: int = -1  # a shard that ends its process the first time
    mark: Path | None = None  # which remembers that

    @property
    def settings(self) -> dict:
        return {"recipe": "numbers", "bad": self.bad}

    @property
    def num_shards(self) -> int:
        return 10

    def samples(self, k: int, skip: Skip) -> Iterator[dict]:
        for i in range(4 * k, 4 * k + 4):
            if k == self.deadly and i % 4 == 2 and parent_process() is not None and not self.mark.exists():
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if i % self.bad == self.bad - 1:
                skip(f"number {i}")
                continue
            yield samples(1, first=i)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Of an undisturbed process."""
    folder = tmp_path_factory.mktemp("whole")
    report = write(Job(Numbers(bad=7), folder, "x"), 1)
    assert report["samples"] == 40 - 5 == sum(s.samples for s in index_is_true(folder))
    assert report["skipped"] == [f"number {i}" for i in (6, 13, 20, 27, 34)]
    assert report["settings"] == {"recipe": "numbers", "bad": 7}
    return contents(folder)


def test_ranks_write_what_one_does_and_the_set_appears_with_the_last(whole, tmp_path, capsys):
    for rank in (2, 0, 1):
        assert not shown(tmp_path)
        report = write(Job(Numbers(bad=7), tmp_path, "x"), 1, rank, world=3)
        assert (report is None) == (rank != 1)
    assert contents(tmp_path) == whole
    assert "appears" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_does_not_show(whole, tmp_path, processes):
    write(Job(Numbers(bad=7), tmp_path, "x"), processes)
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_a_process_that_is_killed_stops_the_writing_which_then_goes_on(whole, tmp_path):
    job = Job(Numbers(7, deadly=3, mark=tmp_path / "mark"), tmp_path / "out", "x")
    with pytest.raises(UserError, match="signal 9"):
        write(job, 2)
    assert (tmp_path / "mark").exists()
    assert not shown(tmp_path / "out")
    write(job, 2)
    assert contents(tmp_path / "out") == whole


def test_after_an_interruption_nothing_is_written_twice(whole, tmp_path, monkeypatch):
    job = Job(Numbers(bad=7), tmp_path, "x")
    written = []
    real = writer.write_shard

    def once(path, found):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path.name)
        return real(path, found)

    monkeypatch.setattr("diffusion_trainer.streaming.recipes.write_shard", once)
    with pytest.raises(KeyboardInterrupt):
        write(job, 1)
    assert not shown(tmp_path)
    first, written[:] = list(written), []
    monkeypatch.setattr("diffusion_trainer.streaming.recipes.write_shard", real)
    monkeypatch.setattr(
        "diffusion_trainer.streaming.recipes.write_shard", lambda p, s: (written.append(p.name), real(p, s))[1]
    )
    write(job, 1)
    assert sorted(first + written) == [f"x-{k:06d}.tar" for k in range(10)]
    assert contents(tmp_path) == whole
    written.clear()
    assert write(job, 1)["samples"] == 35
    assert not written


@pytest.mark.parametrize("last", ["publish", "write_json", "shutil.rmtree"])
def test_the_end_may_be_cut_off_too(whole, tmp_path, monkeypatch, last):
    """Before the shards move, before the record is written, before the staging folder goes."""
    job = Job(Numbers(bad=7), tmp_path, "x")
    real = recipes.write_json

    def die(*arguments, **named):
        if last != "write_json" or arguments[0] == job.record:
            raise Killed
        real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(f"diffusion_trainer.streaming.recipes.{last}", die)
        with pytest.raises(Killed):
            write(job, 1)
    write(job, 1)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("interrupted", [False, True])
def test_other_settings_are_refused_and_change_nothing(tmp_path, interrupted):
    if interrupted:
        write(Job(Numbers(7), tmp_path, "x"), 1, rank=0, world=2)
    else:
        write(Job(Numbers(7), tmp_path, "x"), 1)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="bad was 7, is 5"):
        write(Job(Numbers(5), tmp_path, "x"), 1)
    assert contents(tmp_path) == before


def test_shards_of_others_are_left_alone(tmp_path):
    write_shards(samples(3), tmp_path, "x", 2)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"x-000000\.tar is not of this set"):
        write(Job(Numbers(), tmp_path, "x"), 1)
    assert contents(tmp_path) == before
    write(Job(Numbers(), tmp_path, "y"), 1)
    assert len(index_is_true(tmp_path)) == 12


def test_a_shard_that_is_gone_is_noticed(tmp_path):
    write(Job(Numbers(), tmp_path, "x"), 1)
    (tmp_path / "x-000004.tar").unlink()
    with pytest.raises(UserError, match=r"x-000004\.tar is gone"):
        write(Job(Numbers(), tmp_path, "x"), 1)


def test_strict_stops_and_useless_input_is_no_set(tmp_path):
    with pytest.raises(UserError, match="number 6"):
        write(Job(Numbers(7), tmp_path, "x", strict=True), 1)
    with pytest.raises(UserError, match="nothing could be used: number 0"):
        write(Job(Numbers(1), tmp_path, "y"), 1)
    assert not shown(tmp_path)


@pytest.mark.parametrize("name", ["index", "a/b", ".x", ""])
def test_names_that_cannot_be(tmp_path, name):
    with pytest.raises(UserError, match="--name"):
        Job(Numbers(), tmp_path, name)


def test_a_full_disk_is_told_and_what_is_done_stands(tmp_path, monkeypatch):
    real = os.fsync

    def full(descriptor):
        if len(list(tmp_path.glob(".x.part/*.tar.json"))) == 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left.*same command again"):
        write(Job(Numbers(), tmp_path, "x"), 1)
    notes = [json.loads(p.read_text()) for p in sorted(tmp_path.glob(".x.part/*.tar.json"))]
    assert [n["nsamples"] for n in notes] == [4, 4]
    assert np.all([(tmp_path / ".x.part" / n["url"]).stat().st_size == n["filesize"] for n in notes])


def test_nothing_gets_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """Else a node that loses power may keep the name of a file without its data."""
    on_disk, named = {}, set()
    sync, rename = os.fsync, os.replace

    def synced(descriptor):
        sync(descriptor)
        found = os.fstat(descriptor)
        on_disk[found.st_ino] = found.st_size

    def renamed(source, target):
        found = os.stat(source)
        assert on_disk.get(found.st_ino) == found.st_size, target
        named.add(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write(Job(Numbers(), tmp_path, "x"), 1)
    tar = "x-000000.tar"
    assert {tar, f"{tar}.idx", f"{tar}.crc", f"{tar}.json", "settings.json", "x.json", "index.json"} <= named


@pytest.mark.parametrize("note", [b"", b"\0" * 40, b"{", b"[1, 2]", b"{}", b"\xff"])
def test_a_shard_whose_note_cannot_be_read_is_written_again(whole, tmp_path, note):
    job = Job(Numbers(bad=7), tmp_path, "x")
    assert write(job, 1, rank=0, world=2) is None
    job.note(4).write_bytes(note)
    assert write(job, 1, rank=1, world=2) is None  # it is the other rank's
    assert not shown(tmp_path)
    write(job, 1, rank=0, world=2)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("data", [b"", b"[1, 2", b"[1, 2]", b"{}", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("file", ["x.json", ".x.part/settings.json"])
def test_a_record_that_cannot_be_read_is_named_and_what_to_do(tmp_path, file, data):
    write(Job(Numbers(), tmp_path, "x"), 1, rank=0, world=1 if file == "x.json" else 2)
    (tmp_path / file).write_bytes(data)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"{file}.*; remove|unfinished set with other settings .*, remove it, or"):
        write(Job(Numbers(), tmp_path, "x"), 1)
    assert contents(tmp_path) == before
