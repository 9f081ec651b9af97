"""A store behind the cache: who fetches what, under which name, and which files stay open."""

import os
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from streaming import flaky
from streaming.caching import Child, is_in_order
from streaming.flaky import serving

from diffusion_trainer.streaming.cache import Cache
from diffusion_trainer.streaming.cached import CachedStore
from diffusion_trainer.streaming.fetching import Part
from diffusion_trainer.streaming.index import Shard
from diffusion_trainer.streaming.samples import Samples
from diffusion_trainer.streaming.stores import LocalStore
from diffusion_trainer.streaming.writer import write_shards


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
