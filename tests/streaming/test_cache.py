"""The cache of a node: bounded, shared, and unharmed by a process that is killed at any moment."""

import errno
import fcntl
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from streaming import flaky
from streaming.flaky import serving

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.cache import Cache
from diffusion_trainer.streaming.cached import CachedStore
from diffusion_trainer.streaming.fetching import Part
from diffusion_trainer.streaming.index import Shard
from diffusion_trainer.streaming.locks import locked
from diffusion_trainer.streaming.samples import Samples
from diffusion_trainer.streaming.stores import LocalStore
from diffusion_trainer.streaming.writer import write_shards


class Store:
    """Something to fetch from: entry k is k's digit, `size` times. Counts what it was asked for."""

    def __init__(self, size: int = 100):
        self.size, self.asked = size, []

    def fetch(self, name: str) -> Callable[[Path], None]:
        def into(path: Path) -> None:
            self.asked.append(name)
            path.write_bytes(name[-1].encode() * self.size)

        return into

    def read(self, cache: Cache, name: str) -> bytes:
        descriptor = cache.open(name, self.size, self.fetch(name))
        with open(descriptor, "rb") as file:
            return file.read()


def names(cache: Cache) -> set[str]:
    return {path.name for path in cache.entries.iterdir()}


def counted(cache: Cache) -> int:
    return int((cache.folder / "accounts").read_text())


def is_in_order(cache: Cache) -> bool:
    """Nothing is being fetched, and the accounts are true."""
    there = sum(path.stat().st_size for path in cache.entries.iterdir())
    return not list(cache.fetching.iterdir()) and counted(cache) == there


class Child:
    """A forked process that does some work."""

    def __init__(self, work: Callable[[], None]):
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            signal.alarm(60)
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(code)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error):
        if self.code is None:
            self.kill()

    def end(self) -> int:
        """Waits for it; 0 if nothing was raised."""
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL


def test_what_is_there_is_not_fetched_again(tmp_path):
    store, cache = Store(), Cache(tmp_path, 1000)
    for _ in range(2):
        assert [store.read(cache, f"e{k}") for k in range(5)] == [b"%d" % k * 100 for k in range(5)]
    assert [store.read(Cache(tmp_path, 1000), f"e{k}") for k in range(5)] == [b"%d" % k * 100 for k in range(5)]
    assert store.asked == [f"e{k}" for k in range(5)]
    assert is_in_order(cache)


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    store, cache = Store(), Cache(tmp_path, 350)
    for k in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 comes
        store.read(cache, f"e{k}")
    assert names(cache) == {"e0", "e2", "e3"}
    store.read(cache, "e2")
    store.read(cache, "e4")
    assert names(cache) == {"e2", "e3", "e4"}
    assert is_in_order(cache)


def test_a_cache_of_many_small_entries_loses_several_at_once(tmp_path):
    store, cache = Store(1), Cache(tmp_path, 160)
    for k in range(161):
        store.read(cache, f"e{k:03d}")
    assert names(cache) == {f"e{k:03d}" for k in range(10, 161)}


def test_an_entry_that_cannot_fit_is_refused_before_it_is_fetched(tmp_path):
    store = Store(101)
    with pytest.raises(UserError, match="cache_bytes=100"):
        store.read(Cache(tmp_path, 100), "e1")
    assert not store.asked


def test_who_has_a_file_open_keeps_it(tmp_path):
    store, cache = Store(), Cache(tmp_path, 100)
    descriptor = cache.open("e1", 100, store.fetch("e1"))
    store.read(cache, "e2")
    assert names(cache) == {"e2"}
    assert os.pread(descriptor, 200, 0) == b"1" * 100
    os.close(descriptor)


def test_a_failed_fetch_leaves_nothing(tmp_path):
    store, cache = Store(), Cache(tmp_path, 100)

    def half(path: Path) -> None:
        path.write_bytes(b"1" * 50)
        raise UserError("no")

    for _ in range(3):
        with pytest.raises(UserError, match="no"):
            cache.open("e1", 100, half)
        assert is_in_order(cache)
        assert names(cache) == set()
    assert store.read(cache, "e1") == b"1" * 100


def test_an_entry_that_is_shorter_than_expected_is_counted_as_it_is(tmp_path):
    cache = Cache(tmp_path, 1000)
    os.close(cache.open("e1", 100, lambda path: path.write_bytes(b"1" * 30)))
    os.close(cache.open("e0", 100, lambda path: path.write_bytes(b"")))
    assert counted(cache) == 30
    assert is_in_order(cache)


def test_a_cache_that_is_emptied_while_it_is_used_goes_on(tmp_path):
    store, cache = Store(), Cache(tmp_path / "cache", 1000)
    store.read(cache, "e1")
    for path in [*cache.entries.iterdir(), cache.entries, cache.fetching, cache.folder / "accounts"]:
        path.rmdir() if path.is_dir() else path.unlink()
    assert store.read(cache, "e1") == b"1" * 100
    assert is_in_order(cache)


def test_who_does_not_wait_leaves_what_others_fetch_and_what_has_no_room(tmp_path):
    store, cache = Store(), Cache(tmp_path, 150)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(path: Path) -> None:
        begun.set()
        assert go_on.wait(20)
        store.fetch("e1")(path)

    thread = threading.Thread(target=lambda: os.close(cache.open("e1", 100, slowly)))
    thread.start()
    assert begun.wait(20)
    hasty = Cache(tmp_path, 150, wait=False)
    assert hasty.open("e1", 100, store.fetch("e1")) is None
    assert hasty.open("e2", 100, store.fetch("e2")) is None  # the room is taken
    released = threading.Event()
    patient = Cache(tmp_path, 150, release=released.set)
    waiting = threading.Thread(target=lambda: store.read(patient, "e2"))
    waiting.start()
    assert released.wait(20)  # who waits for room gives up what it can
    assert not store.asked
    go_on.set()
    thread.join()
    waiting.join()
    assert store.asked == ["e1", "e2"]
    assert names(cache) == {"e2"}
    assert is_in_order(cache)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_costs_old_entries_and_then_the_run(tmp_path, number):
    """A disk that has room for three entries, where the cache may have ten."""
    store, cache = Store(), Cache(tmp_path, 1000)

    def full(name: str) -> Callable[[Path], None]:
        def into(path: Path) -> None:
            if len(names(cache)) >= room:
                path.write_bytes(b"half")
                raise OSError(number, "full")
            store.fetch(name)(path)

        return into

    room = 3
    for k in range(6):
        os.close(cache.open(f"e{k}", 100, full(f"e{k}")))
    assert names(cache) == {"e3", "e4", "e5"}
    with pytest.raises(UserError, match="full"):  # what is fetched ahead removes nothing
        Cache(tmp_path, 1000, wait=False).open("e7", 100, full("e7"))
    assert names(cache) == {"e3", "e4", "e5"}
    room = 0
    with pytest.raises(UserError, match=rf"(?s){tmp_path} is full: 100 bytes are needed, \d+ are free"):
        cache.open("e6", 100, full("e6"))
    assert is_in_order(cache)


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache .*/file/cache cannot be used"):
        Cache(tmp_path / "file" / "cache", 100)


def test_what_a_killed_process_left_is_removed_and_counted_no_more(tmp_path):
    cache, store = Cache(tmp_path, 300), Store()
    begun, tell = os.pipe()

    def killed(path: Path) -> None:
        path.write_bytes(b"x" * 50)
        os.write(tell, b"!")
        signal.pause()

    with Child(lambda: cache.open("e1", 200, killed)) as child:
        os.read(begun, 1)
        assert len(list(cache.fetching.iterdir())) == 2
        store.read(cache, "e2")
        assert counted(cache) == 300
        child.kill()
    assert store.read(cache, "e3") == b"3" * 100  # the room of the dead is free
    assert names(cache) == {"e2", "e3"}
    assert is_in_order(cache)
    assert store.read(cache, "e1") == b"1" * 100


def test_a_new_process_removes_what_the_dead_left(tmp_path):
    cache, store = Cache(tmp_path, 300), Store()
    for name in ("e1.lock", "e1.part", "e2.part", "e3.lock"):
        (cache.fetching / name).write_bytes(b"x" * 100)
    Cache(tmp_path, 300)
    assert not list(cache.fetching.iterdir())
    assert store.read(cache, "e1") == b"1" * 100


def test_a_new_process_frees_the_room_that_the_dead_took(tmp_path):
    begun, tell = os.pipe()

    def killed(path: Path) -> None:
        os.write(tell, b"!")
        signal.pause()

    with Child(lambda: Cache(tmp_path, 300).open("e1", 200, killed)) as child:
        os.read(begun, 1)
        assert counted(Cache(tmp_path, 300)) == 200  # it lives
        child.kill()
    assert counted(Cache(tmp_path, 300)) == 0


def test_a_lock_dies_with_its_process_though_a_child_of_it_lives(tmp_path):
    path, (begun, tell) = tmp_path / "lock", os.pipe()

    def parent() -> None:
        with locked(path):
            grandchild = os.fork()
            if grandchild == 0:
                os.write(tell, b"%d" % os.getpid())
                signal.pause()
            signal.pause()

    with Child(parent) as child:
        grandchild = int(os.read(begun, 20))
        try:
            with locked(path, wait=False) as lock:
                assert lock is None
            child.kill()
            with locked(path, wait=False) as lock:
                assert lock is not None
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_a_child_does_not_free_its_parents_lock(tmp_path):
    lock = locked(tmp_path / "lock")
    lock.__enter__()
    with Child(lambda: lock.__exit__(None, None, None)) as child:
        assert child.end() == 0
    with open(tmp_path / "lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.__exit__(None, None, None)
    with open(tmp_path / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_the_bound_holds_at_every_moment(tmp_path):
    """Four processes, entries of many sizes, some of which fail; the folder is measured all the while."""
    limit, largest = 100_000, 20_000

    def work(seed: int) -> None:
        draws = np.random.default_rng(seed)
        caches = [Cache(tmp_path, limit, wait=wait) for wait in (True, True, True, False)]
        for k in draws.integers(0, 40, 150):
            size = int(k) * 500 + 1

            def fetch(path: Path, k: int = k, size: int = size) -> None:
                with path.open("wb", buffering=0) as file:
                    for _ in range(4):
                        file.write(bytes([k]) * (size // 4))
                    file.write(bytes([k]) * (size % 4))
                if draws.random() < 0.1:
                    raise UserError("ill")

            try:
                descriptor = caches[draws.integers(4)].open(f"e{k}", size, fetch)
            except UserError:
                continue
            if descriptor is not None:
                assert os.pread(descriptor, size + 1, 0) == bytes([k]) * size
                os.close(descriptor)

    with ExitStack() as stack:
        children = [stack.enter_context(Child(partial(work, seed))) for seed in range(4)]
        most, working = 0, {child.pid for child in children}
        while working:
            most = max(most, _bytes(tmp_path))
            working -= {pid for pid in working if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)}
        assert [child.end() for child in children] == [0] * 4
    assert limit / 2 < most <= limit + largest
    assert is_in_order(Cache(tmp_path, limit))


def _bytes(folder: Path) -> int:
    total = 0
    for path in [*(folder / "entries").glob("*"), *(folder / "fetching").glob("*.part")]:
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.fixture
def shards(tmp_path) -> Path:
    draws = np.random.default_rng(0)
    samples = [{"__key__": f"{i:04d}", "bin": draws.bytes(700 + 50 * i)} for i in range(30)]
    write_shards(iter(samples), tmp_path / "shards", "x", 10)
    return tmp_path / "shards"


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(shards) as server:
        yield server


def digest(store, pattern: str) -> list[bytes]:
    found = store.find(pattern)
    samples = Samples(found, store, 1 << 20)
    return [bytes(samples.bytes_of(k, i)) for k, shard in enumerate(found) for i in range(shard.samples)]


@pytest.mark.slow
@pytest.mark.parametrize("piece_bytes", [None, 8192], ids=["whole", "pieces"])
def test_four_processes_race_and_the_one_that_fetches_is_killed(piece_bytes, server, shards, tmp_path):
    first, truth = "/x-000000.tar", digest(LocalStore(), f"{shards}/*.tar")
    server.script[first] = [flaky.stall]

    def read() -> None:
        store = CachedStore(str(tmp_path / "cache"), 1 << 20, piece_bytes=piece_bytes, timeout_seconds=60)
        assert digest(store, f"{server.url}/*.tar") == truth

    with Child(read) as victim:
        while server.count(first) == 0:
            assert server.arrived.acquire(timeout=20)
        with Child(read) as a, Child(read) as b, Child(read) as c:
            while server.requests.count(("GET", "/index.json")) < 4:
                assert server.arrived.acquire(timeout=20)
            victim.kill()
            assert [a.end(), b.end(), c.end()] == [0, 0, 0]
    once = [name for name in server.files if name.endswith((".tar", ".idx", ".crc")) and name != first]
    pieces = {name: -(-len(server.files[name]) // piece_bytes) if piece_bytes else 1 for name in once}
    assert all(0 < server.count(name) <= pieces[name] for name in once)
    assert server.count(first) <= 1 + (-(-len(server.files[first]) // piece_bytes) if piece_bytes else 1)
    assert is_in_order(Cache(tmp_path / "cache", 1 << 20))


def test_two_sources_with_equal_names_do_not_meet(server, shards, tmp_path):
    others = [{"__key__": f"{i:04d}", "bin": b"other"} for i in range(30)]
    write_shards(iter(others), tmp_path / "others", "x", 10)
    server.files |= {f"/other/{p.name}": p.read_bytes() for p in (tmp_path / "others").iterdir()}
    store = CachedStore(str(tmp_path / "cache"), 1 << 20)
    for _ in range(2):
        assert digest(store, f"{server.url}/*.tar") == digest(LocalStore(), f"{shards}/*.tar")
        assert digest(store, f"{server.url}/other/*.tar") == digest(LocalStore(), f"{tmp_path}/others/*.tar")


def test_shards_written_again_under_their_names_are_others(server, shards, tmp_path):
    store = CachedStore(str(tmp_path / "cache"), 1 << 20)
    digest(store, f"{server.url}/*.tar")
    draws = np.random.default_rng(1)
    write_shards(({"__key__": f"{i:04d}", "bin": draws.bytes(700 + 50 * i)} for i in range(30)), shards, "x", 10)
    server.files = {f"/{p.name}": p.read_bytes() for p in shards.iterdir()}
    assert digest(CachedStore(store.cache, 1 << 20), f"{server.url}/*.tar") == digest(LocalStore(), f"{shards}/*.tar")


@pytest.mark.parametrize("url", ["http://h/../../etc/x.tar", "s3://b/x\0.tar", "file:////x.tar", "pipe:cat /x.tar"])
def test_no_name_leads_out_of_the_cache(url):
    shard = Shard(url, 1, 2048, 3)
    parts = [Part(shard, 2048), Part(shard, 1024, 0), Part(shard, 1024, 1024), Part.sidecar(shard, ".idx")]
    parts += [Part(replace(shard, crc32=4), 2048), Part(replace(shard, size=2049), 2048)]
    found = [part.name for part in parts]
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in found)
    assert len(set(found)) == len(found)


def test_nothing_is_written_outside_of_the_cache(server, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    digest(CachedStore("cache", 1 << 20), f"{server.url}/*.tar")
    new = set(tmp_path.rglob("*")) - before
    assert new
    assert all(path == tmp_path / "cache" or tmp_path / "cache" in path.parents for path in new)


def test_files_of_evicted_shards_are_closed(server, shards, tmp_path):
    """Else the disk would fill behind the bound."""
    size = max(path.stat().st_size for path in shards.glob("*.tar"))
    store = CachedStore(str(tmp_path / "cache"), int(1.2 * size))
    found = store.find(f"{server.url}/*.tar")
    for shard in found:
        store.read(shard, 0, memoryview(bytearray(10)))
    with pytest.warns(UserWarning, match=r"the cache .* is too small"):
        store.read(found[0], 0, memoryview(bytearray(10)))
    links = [os.readlink(f"/proc/self/fd/{d}") for d in os.listdir("/proc/self/fd") if _is_open(d)]
    assert sum(str(tmp_path) in link and "deleted" in link for link in links) <= 1


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def test_what_is_used_is_marked_so(server, tmp_path, monkeypatch):
    store = CachedStore(str(tmp_path / "cache"), 1 << 20)
    shard = store.find(f"{server.url}/*.tar")[0]
    store.read(shard, 0, memoryview(bytearray(10)))
    entry = tmp_path / "cache" / "entries" / Part(shard, shard.size).name
    os.utime(entry, (0, 0))
    store.read(shard, 0, memoryview(bytearray(10)))
    assert entry.stat().st_mtime == 0  # not at every sample
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    store.read(shard, 0, memoryview(bytearray(10)))
    assert entry.stat().st_mtime > 0
