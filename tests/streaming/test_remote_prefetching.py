"""What is fetched ahead from a store is fetched once, and its failures are told to the reader alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from queue import Queue
from threading import Event

import pytest
from streaming import flaky
from streaming.stores import FIRST, MODES, NAMES, PIECE, contents, gets, spans, wait_until
from streaming.three_shards import folder, make, server, truth  # noqa: F401 (fixtures)

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming import prefetching
from diffusion_trainer.streaming.files import THREADS
from diffusion_trainer.streaming.prefetching import Prefetcher


@MODES
def test_what_was_fetched_ahead_is_not_fetched_again(piece_bytes, server, folder, truth, make):
    store = make(piece_bytes)
    wanted = spans(store, f"{server.url}/*.tar")
    for _ in range(3):
        store.prefetch(wanted)
    needed = {name: gets(folder, name, piece_bytes) for name in NAMES}
    entries = Path(store.cache) / "entries"
    wait_until(lambda: len(list(entries.iterdir())) == len(NAMES) + sum(needed.values()))
    assert {name: server.count(f"/{name}") for name in NAMES} == needed
    assert contents(store, f"{server.url}/*.tar") == truth
    assert {name: server.count(f"/{name}") for name in NAMES} == needed


def test_index_files_are_fetched_ahead_too_and_not_again(server, truth, make):
    store = make()
    shards = store.find(f"{server.url}/*.tar")
    store.sidecar(shards[0], ".idx")  # the first in a cache counts what is there; a thread that meets this passes
    for _ in range(3):
        store.prefetch_sidecars(shards)
    wanted = [f"/{name}{suffix}" for name in NAMES for suffix in (".idx", ".crc")]
    wait_until(lambda: len(list((Path(store.cache) / "entries").iterdir())) == len(wanted))
    assert [server.count(path) for path in wanted] == [1] * len(wanted)
    assert contents(store, f"{server.url}/*.tar") == truth
    assert [server.count(path) for path in wanted] == [1] * len(wanted)


def test_index_files_in_a_folder_are_not_asked_of_the_store(server, folder, make):
    store = make(index=str(folder))
    store.prefetch_sidecars(store.find(f"{server.url}/*.tar"))
    assert contents(store, f"{server.url}/*.tar")
    assert not any(server.count(f"/{name}.idx") for name in NAMES)


def test_what_goes_wrong_ahead_is_told_to_the_reader_alone(server, folder, truth, make):
    """And ends no thread: there are fewer of them than pieces here."""
    store = make(PIECE, cache_bytes=1 << 22)
    wanted = spans(store, f"{server.url}/*.tar")
    server.always[FIRST] = flaky.status(403)
    bad, good = gets(folder, NAMES[0], PIECE), gets(folder, NAMES[2], PIECE)
    assert bad >= THREADS
    store.prefetch(wanted[:10])
    store.prefetch(wanted[20:])
    wait_until(lambda: (server.count(FIRST), server.count(f"/{NAMES[2]}")) == (bad, good))
    with pytest.raises(UserError, match="credentials"):
        store.read(*wanted[0][:2], memoryview(bytearray(10)))
    del server.always[FIRST]
    assert contents(store, f"{server.url}/*.tar") == truth


def test_a_forked_process_reads_and_fetches_ahead(server, truth, make):
    store = make()
    wanted = spans(store, f"{server.url}/*.tar")
    store.prefetch(wanted[:1])
    store.read(wanted[0][0], 0, memoryview(bytearray(10)))
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            store.prefetch(wanted)
            wait_until(lambda: len(list((Path(store.cache) / "entries").iterdir())) == 2 * len(NAMES))
            os._exit(0 if contents(store, f"{server.url}/*.tar") == truth else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(store, f"{server.url}/*.tar") == truth
    assert all(server.count(f"/{name}") == 1 for name in NAMES)


def test_what_is_asked_for_again_and_again_is_fetched_once_a_minute(monkeypatch):
    fetched, now = Queue(), 1000.0
    monkeypatch.setattr(prefetching.time, "monotonic", lambda: now)
    fetch = Prefetcher(fetched.put, 1)
    for _ in range(3):
        fetch("abc")
    now += 61
    fetch("cd")
    assert [fetched.get(timeout=20) for _ in range(5)] == ["a", "b", "c", "c", "d"]
    assert fetched.empty()


def test_what_finds_no_place_in_the_queue_may_be_asked_for_again():
    go_on, fetched = Event(), Queue()
    fetch = Prefetcher(lambda thing: (go_on.wait(20), fetched.put(thing)), 1)
    fetch(range(5000))  # at once, though nothing is fetched
    go_on.set()
    first = [fetched.get(timeout=20) for _ in range(prefetching.MAX_QUEUED)]
    assert first == list(range(prefetching.MAX_QUEUED))
    fetch([4999])
    while fetched.get(timeout=20) != 4999:
        pass


ENDING = """
import sys
from diffusion_trainer.streaming.cached import CachedStore
store = CachedStore(sys.argv[1], 1 << 20, timeout_seconds=1000)
store.prefetch([(shard, 0, 10) for shard in store.find(sys.argv[2] + "/*.tar")])
sys.stdin.readline()
"""


@pytest.mark.slow
def test_an_interpreter_that_ends_does_not_wait_for_what_it_fetches(server, tmp_path):
    server.always = {f"/{name}": flaky.stall for name in NAMES}
    arguments = [sys.executable, "-c", ENDING, str(tmp_path / "cache"), server.url]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(2):  # the index, and one of those that stall
        assert server.arrived.acquire(timeout=60)
    _, errors = process.communicate("\n", timeout=30)
    assert process.returncode == 0, errors
    assert not errors
