"""The cache of a node is unharmed by a process that is killed at any moment, and its bound holds at every moment."""

import fcntl
import os
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from streaming.caching import Child, Store, counted, is_in_order, names

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.cache import Cache
from diffusion_trainer.streaming.locks import locked


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
@pytest.mark.parametrize("killed", [0, 1])
def test_the_bound_holds_at_every_moment(tmp_path, killed):
    """Four processes, entries of many sizes, some of which fail; the folder is measured all the while. killed: so many
    are, at a moment of their own; the others wait no longer for them, and read what they asked for."""
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
            if most > limit / 2 and children[0].code is None and killed:
                children[0].kill()
                working.discard(children[0].pid)
            working -= {pid for pid in working if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)}
        assert [child.end() for child in children[killed:]] == [0] * (4 - killed)
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
