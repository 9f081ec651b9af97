"""Indexing goes on where it was interrupted, and leaves damaged shards out."""

import fcntl
import os
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from streaming.making import END, member, shard_bytes, write_set

from diffusion_trainer.streaming import indexing, locks
from diffusion_trainer.streaming.index import Shard, read_index, serialized
from diffusion_trainer.streaming.indexing import AT_ONCE, index
from diffusion_trainer.streaming.remote import Remote
from diffusion_trainer.streaming.retries import Retries
from diffusion_trainer.streaming.scanning import scan
from diffusion_trainer.streaming.sites import LocalSite, RemoteSite


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """In place of processes, which take seconds to start; tests/apps/test_index_command.py has real ones."""
    monkeypatch.setattr(indexing, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))


@pytest.fixture
def tars(tmp_path) -> list[Path]:
    """Five without an index."""
    for k in range(5):
        (tmp_path / f"x-{k}.tar").write_bytes(shard_bytes(range(10 * k, 10 * k + k)))
    return sorted(tmp_path.glob("*.tar"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2000)


@pytest.mark.parametrize("processes", [1, 3])
def test_the_files_are_those_that_writers_make(tars, tmp_path_factory, processes):
    report = index(tars, processes)
    folder = tars[0].parent
    for path in tars:
        found = scan(path)
        assert Path(f"{path}.idx").read_bytes() == found.offsets.astype("<u8").tobytes()
        assert Path(f"{path}.crc").read_bytes() == found.checksums.astype("<u4").tobytes()
    assert read_index(folder / "index.json") == [scan(path).shard(path.name) for path in tars]
    assert sorted(s.url for s in report.shards) == [p.name for p in tars]
    assert report.fields == {("cls", "npy"): 10}
    assert (report.known, report.damaged) == (0, {})
    assert len(contents(folder)) == 16  # no parts are left


def test_what_is_indexed_is_not_read_again_unless_asked(tars, monkeypatch):
    index(tars[:3], 1)
    before = contents(tars[0].parent)
    read = []
    monkeypatch.setattr(indexing, "scan", lambda path: read.append(path) or scan(path))
    assert index(tars, 1).known == 3
    assert read == tars[3:]
    assert before.items() - contents(tars[0].parent).items() == {("index.json", before["index.json"])}
    read.clear()
    assert index(tars, 1, again=True).known == 0
    assert sorted(read) == tars


@pytest.mark.parametrize("mend", ["grow", "no sidecar"])
def test_an_index_that_does_not_fit_is_made_again(tars, mend):
    index(tars, 1)
    tars[2].write_bytes(shard_bytes(range(7))) if mend == "grow" else Path(f"{tars[2]}.crc").unlink()
    report = index(tars, 1)
    assert report.known == 4
    assert read_index(tars[0].parent / "index.json") == [scan(path).shard(path.name) for path in tars]


@pytest.mark.parametrize("after", [1, 3])
def test_what_was_done_before_an_interruption_stands(tars, after):
    def interrupt(done: int, size: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(tars, 1, progress=interrupt)
    assert len(read_index(tars[0].parent / "index.json")) >= after
    report = index(tars, 1)
    assert report.known >= after
    assert read_index(tars[0].parent / "index.json") == [scan(path).shard(path.name) for path in tars]


def test_a_damaged_shard_is_left_out_and_named_or_kept_for_its_whole_samples(tars):
    cut(tars[4])
    report = index(tars, 1)
    assert list(report.damaged) == [str(tars[4])]
    assert "3 whole samples" in report.damaged[str(tars[4])]
    assert [s.url for s in read_index(tars[0].parent / "index.json")] == [p.name for p in tars[:4]]
    assert not Path(f"{tars[4]}.idx").exists()
    report = index(tars, 1, keep_damaged=True)
    assert (list(report.damaged), report.known) == ([str(tars[4])], 4)
    assert [s.samples for s in read_index(tars[0].parent / "index.json")] == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("again", [False, True])
def test_a_shard_that_was_damaged_since_it_was_indexed_is_taken_out(tars, again):
    index(tars, 1)
    cut(tars[4])
    report = index(tars, 1, again=again)
    assert list(report.damaged) == [str(tars[4])]
    assert [s.url for s in read_index(tars[0].parent / "index.json")] == [p.name for p in tars[:4]]


def test_shards_of_several_folders_have_an_index_each(tmp_path):
    paths = [p for name in "ab" for p in write_set(tmp_path / name, [1, 2])]
    for path in tmp_path.glob("*/index.json"):
        path.unlink()
    index(paths, 2)
    assert [len(read_index(tmp_path / name / "index.json")) for name in "ab"] == [2, 2]


def test_progress_counts_shards_and_bytes(tars):
    said = []
    index(tars, 1, progress=lambda *now: said.append(now))
    assert [done for done, _ in said] == [1, 2, 3, 4, 5]
    assert said[-1][1] == sum(p.stat().st_size for p in tars)


def picture(format: str, size: tuple[int, int]) -> bytes:
    out = BytesIO()
    Image.new("RGB", size).save(out, format)
    return out.getvalue()


def test_the_sizes_of_images_for_buckets(tmp_path):
    data = member("a.jpg", picture("jpeg", (30, 20))) + member("b.PNG", picture("png", (5, 9)))
    path = tmp_path / "x.tar"
    path.write_bytes(data + member("c.png", b"no picture") + member("d.cls", b"1") + END)
    index([path], 1, image_sizes=True)
    sizes = np.frombuffer(Path(f"{path}.size").read_bytes(), "<u4").reshape(-1, 2)
    assert sizes.tolist() == [[20, 30], [9, 5], [0, 0], [0, 0]]
    Path(f"{path}.size").unlink()
    assert index([path], 1).known == 1
    assert index([path], 1, image_sizes=True).known == 0
    assert index([path], 1, image_sizes=True).known == 1
    (shard,) = read_index(tmp_path / "index.json")
    assert shard.fits(".size", Path(f"{path}.size").read_bytes())
    (tmp_path / "index.json").write_bytes(serialized([replace(shard, sizes=None)]))  # as it was before they were summed
    assert index([path], 1, image_sizes=True).known == 0
    assert read_index(tmp_path / "index.json") == [shard]


def test_the_sizes_of_images_beside_what_is_larger_than_the_memory(tmp_path):
    large, header = 1 << 26, tarfile.TarInfo("a.bin")
    header.size = large
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(header.tobuf())
        file.seek(large, os.SEEK_CUR)
        file.write(member("a.png", picture("png", (5, 9))) + END)
    tracemalloc.start()
    try:
        index([tmp_path / "x.tar"], 1, image_sizes=True)
        assert tracemalloc.get_traced_memory()[1] < large // 4
    finally:
        tracemalloc.stop()
    assert np.frombuffer((tmp_path / "x.tar.size").read_bytes(), "<u4").tolist() == [9, 5]


def test_a_few_bytes_are_not_worth_a_process(tars, monkeypatch):
    monkeypatch.setattr(indexing, "ProcessPoolExecutor", None)
    assert len(index(tars, None).shards) == 5


def test_many_bytes_are_read_by_as_many_processes_as_there_are_cores_and_shards(tars, monkeypatch):
    pools = []
    monkeypatch.setattr(indexing, "BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(indexing, "ProcessPoolExecutor", lambda n, *_: pools.append(n) or ThreadPoolExecutor(n))
    for cores in (3, 64):
        monkeypatch.setattr(indexing, "cores", lambda cores=cores: cores)
        index(tars, None, again=True)
    assert pools == [3, 5]


def write(site: LocalSite, end: Connection) -> None:
    """Of another process: it stays between writing and renaming until it is told to go on."""

    def replace(part: Path, path: Path) -> None:
        end.send(part)
        end.recv()
        os.rename(part, path)

    locks.os.replace = replace
    site.put(f"{site.name}.idx", b"written")


@pytest.mark.slow
def test_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(tars):
    folder, context = tars[0].parent, get_context("spawn")  # threads of other tests would be lost in a fork
    ends = [context.Pipe() for _ in range(2)]
    dead, living = (context.Process(target=write, args=(LocalSite(tars[0]), end)) for _, end in ends)
    try:
        dead.start()
        living.start()
        assert all(mine.poll(60) for mine, _ in ends)
        parts = [mine.recv() for mine, _ in ends]
        dead.kill()
        dead.join()
        assert set(folder.glob(".*")) == set(parts)
        index(tars[1:], 1)
        assert list(folder.glob(".*")) == parts[1:]
        ends[1][0].send("go on")
        living.join()
        assert (living.exitcode, Path(f"{tars[0]}.idx").read_bytes()) == (0, b"written")
    finally:
        dead.kill()
        living.kill()


def test_what_is_removed_before_its_writer_has_locked_it_is_written_again(tmp_path, monkeypatch):
    """A process that cleans may come between the opening of a part and its locking."""
    site, before = LocalSite(tmp_path / "x.tar"), iter([True])

    def lock(file, how):
        if next(before, False):
            site.clean()
            assert not list(tmp_path.iterdir())
        fcntl.flock(file, how)

    monkeypatch.setattr(locks, "fcntl", SimpleNamespace(**{**vars(fcntl), "flock": lock}))
    site.put("x.tar.idx", b"1")
    assert contents(tmp_path) == {"x.tar.idx": b"1"}


@dataclass(frozen=True)
class Slow(RemoteSite):
    """Writes the index once another process would have been done with it, if it may."""

    other: Thread | None = None

    def put(self, name: str, data: bytes) -> None:
        self.other.start()
        self.other.join(0.05)
        super().put(name, data)


def test_two_that_index_into_one_folder_keep_each_others_shards(tmp_path):
    store = Remote(20.0), Retries(0, 0.0), tmp_path / "out"
    site = RemoteSite("memory://d/b.tar", *store)
    other = Thread(target=site.list, args=([Shard("b.tar", 1, 1024, 0)], ()))
    Slow("memory://d/a.tar", *store, other).list([Shard("a.tar", 1, 1024, 0)], ())
    other.join()
    assert {shard.url for shard in site.listed()} == {"a.tar", "b.tar"}


def test_a_store_is_asked_many_things_at_a_time(monkeypatch):
    """Each question waits until as many are under way as may be."""
    sites = [RemoteSite(f"memory://d/{k}.tar", Remote(20.0), Retries(0, 0.0)) for k in range(2 * AT_ONCE)]
    shards, together = [Shard(site.name, 1, 2048, 0) for site in sites], Barrier(AT_ONCE, timeout=20)
    monkeypatch.setattr(RemoteSite, "listed", lambda site: shards)
    monkeypatch.setattr(RemoteSite, "is_indexed", lambda site, size, suffixes: together.wait() >= 0)
    report = indexing.Report()
    assert indexing._without_index(sites, False, report) == []
    assert report.shards == shards
