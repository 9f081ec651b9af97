"""The cache of a node: bounded, shared, and in order whatever fails."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from streaming.caching import Store, counted, is_in_order, names

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.cache import Cache


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
