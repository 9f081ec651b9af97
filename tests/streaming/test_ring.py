"""Batches travel through shared memory: none is written over before it was taken, and a dead worker is an error."""

import gc
import os
import signal
import time
import weakref
from collections import deque
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming.making import Number, Row, shard_data, theorem, write_set

from diffusion_trainer.streaming import loader as loading
from diffusion_trainer.streaming.fields import Field
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.ring import Entry, Ring

pytestmark = pytest.mark.slow

DTYPES = st.sampled_from([np.dtype(t) for t in ("u1", "<f2", "<f4", "<i8")])
ENTRIES = st.lists(st.builds(Entry, st.lists(st.integers(1, 5), max_size=3).map(tuple), DTYPES), max_size=4)


@theorem(60)
@given(st.integers(1, 4), st.integers(1, 4), st.lists(ENTRIES, min_size=1, max_size=3))
def test_no_two_arrays_share_a_byte_unless_they_are_kinds_of_one_slot(workers, depth, kinds):
    ring = Ring(workers, depth, kinds)
    slots = [ring.take(worker) for worker in range(workers) for _ in range(depth)]
    assert sorted(slots) == list(range(workers * depth))
    for kind, entries in enumerate(kinds):
        arrays = [ring.arrays(slot, kind) for slot in slots]
        for found in arrays:
            assert [(a.shape, a.dtype) for a in found] == [(e.shape, e.dtype) for e in entries]
            assert all(a.ctypes.data % 64 == 0 for a in found)
        flat = [a for found in arrays for a in found]
        assert not any(np.shares_memory(a, b) for a, b in combinations(flat, 2))
        for value, array in enumerate(flat):
            array[...] = value % 100
        assert all((array == value % 100).all() for value, array in enumerate(flat))


NUMBERS = [Entry((3,), np.dtype("<i8")), Entry((2,), np.dtype("u1"))]


@theorem(200)
@given(st.integers(1, 3), st.integers(0, 2), st.integers(0, 3), st.data())
def test_a_worker_finds_a_slot_whatever_the_reader_keeps_and_nothing_that_is_kept_changes(
    workers, ahead, lendable, data
):
    """Against a model: workers at most `ahead` batches ahead; a reader that keeps each batch as long as it likes."""
    ring, value = Ring(workers, ahead + 1 + lendable, [NUMBERS], lendable), 0
    ready, kept = [deque() for _ in range(workers)], []
    for _ in range(data.draw(st.integers(1, 40))):
        worker = data.draw(st.integers(0, workers - 1))
        if len(ready[worker]) <= ahead:
            slot = ring.take(worker)
            assert slot // ring.depth == worker
            for array in ring.arrays(slot):
                array[:] = value % 100
            ready[worker].append((slot, value % 100))
            value += 1
        else:
            slot, expected = ready[worker].popleft()
            lent_already = {kept_slot for kept_slot, lent, _, _ in kept if lent and kept_slot // ring.depth == worker}
            lent, tensors = received(ring, slot)
            assert lent == (len(lent_already) < lendable)
            kept += [(slot, lent, expected, tensor) for tensor in tensors]
            del tensors
        if kept and data.draw(st.booleans()):
            kept.pop(data.draw(st.integers(0, len(kept) - 1)))
        assert all((tensor == expected).all() for _, _, expected, tensor in kept)


def received(ring, slot):
    """Whether the arrays are lent, and these or copies of them."""
    arrays = ring.lend(slot)
    if arrays is not None:
        return True, [torch.from_numpy(array) for array in arrays]
    copies = [torch.from_numpy(array.copy()) for array in ring.arrays(slot)]
    ring.give_back(slot)
    return False, copies


def test_a_child_writes_what_its_parent_reads():
    ring = Ring(1, 2, [NUMBERS])
    child = os.fork()
    if not child:
        ring.arrays(ring.take(0))[0][:] = (7, 8, 9)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (ring.arrays(0)[0].tolist(), ring.arrays(1)[0].tolist()) == ([7, 8, 9], [0, 0, 0])
    assert ring.take(0) == 1  # and sees what its child has taken


def test_views_of_a_lent_array_keep_it_and_a_forked_process_cannot_return_it():
    ring = Ring(1, 2, [NUMBERS], lendable=1)
    numbers = torch.from_numpy(ring.lend(ring.take(0))[0])[1:].view(2, 1)
    child = os.fork()
    if not child:
        del numbers  # its own
        os._exit(ring.take(0) != 1)
    assert os.waitpid(child, 0)[1] == 0
    ring.give_back(1)  # which the child had taken
    assert ring.take(0) == 1
    with pytest.raises(RuntimeError, match="all slots are in use"):
        ring.take(0)
    del numbers
    assert ring.take(0) == 0


def test_a_lent_array_keeps_its_own_slot_alone():
    ring = Ring(2, 3, [NUMBERS], lendable=1)
    memory = [weakref.ref(slot[0][0].base) for slot in ring._slots]
    assert all(slot() is not None for slot in memory)
    lent = ring.lend(ring.take(1))[0]
    del ring
    gc.collect()
    assert [k for k, slot in enumerate(memory) if slot() is not None] == [3]
    del lent
    assert memory[3]() is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, [50, 30, 20])
    return folder


@pytest.mark.parametrize("kept", [0, 1, 2, 100])
@pytest.mark.parametrize(("workers", "prefetch"), [(0, 2), (1, 1), (1, 4), (2, 2), (3, 1)])
def test_batches_stay_as_they_are_while_workers_run_ahead(folder, monkeypatch, workers, prefetch, kept):
    """The reader is slow, so that workers have done all that they may, over five rounds; it keeps some batches."""
    steps = 5 * max(1, workers) * (prefetch + 3)
    alone = [
        {name: batch[name].clone() for name in ("image", "label")}
        for batch in shard_data(f"{folder}/*.tar").loader(Layout(4), 0, 4, 0, steps)
    ]
    monkeypatch.setattr(loading, "_copy", slow(loading._copy))
    monkeypatch.setattr(Ring, "lend", slow(Ring.lend))
    data = shard_data(f"{folder}/*.tar", num_workers=workers, prefetch=prefetch)
    held = deque(maxlen=kept + 1)
    for step, batch in enumerate(data.loader(Layout(4), 0, 4, 0, steps)):
        held.append((alone[step], batch))
        assert all((ours[name] == theirs[name]).all() for ours, theirs in held for name in ours)
    assert step == steps - 1


def slow(call):
    def slowly(*arguments):
        time.sleep(0.005)
        return call(*arguments)

    return slowly


def test_a_batch_outlives_its_loader_and_all_but_a_few_of_many_are_copies(folder):
    batches = list(shard_data(f"{folder}/*.tar", num_workers=2).loader(Layout(4), 0, 4, 0, 12))
    alone = [batch["label"].tolist() for batch in shard_data(f"{folder}/*.tar").loader(Layout(4), 0, 4, 0, 12)]
    gc.collect()
    assert [batch["label"].tolist() for batch in batches] == alone
    lent = [batch for batch in batches if batch["label"].data_ptr() - batch["image"].data_ptr() == 64]
    assert len(lent) <= 2 * loading.LENDABLE


def test_workers_stay_within_their_prefetch(folder, tmp_path):
    """No more batches are being made than the ring has room for."""
    made = tmp_path / "made"
    made.touch()
    fields = {"image": Row(), "label": Noting(str(made))}
    data = shard_data(f"{folder}/*.tar", fields=fields, num_workers=1, prefetch=3)
    batches = iter(data.loader(Layout(1), 0, 4, 0, 100))
    for taken in range(1, 10):
        next(batches)
        time.sleep(0.05)
        assert made.stat().st_size <= taken + 3


@dataclass(frozen=True)
class Noting(Number):
    """Appends a byte to a file for each sample that is decoded."""

    path: str = ""

    def decode(self, data, out, draws):
        with open(self.path, "ab", buffering=0) as file:
            file.write(b".")
        super().decode(data, out, draws)


def children() -> set[int]:
    own = os.getpid()
    return {int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_an_error_and_no_hang_and_leaves_nobody_behind(folder, workers):
    before = children()
    data = shard_data(f"{folder}/*.tar", num_workers=workers, prefetch=1)
    batches = iter(data.loader(Layout(4), 0, 4, 0, 10**9))
    next(batches)
    started = children() - before
    assert len(started) == workers
    os.kill(min(started), signal.SIGKILL)
    begin = time.monotonic()
    (error,) = (batch["error"] for batch in islice(batches, 1000) if "error" in batch)
    assert "DataLoader worker" in error
    assert "run the same command again to resume" in error
    assert time.monotonic() - begin < 15
    del batches
    end = time.monotonic() + 15
    while children() - before and time.monotonic() < end:
        time.sleep(0.02)
    assert not children() - before


def test_a_worker_outlives_the_signals_that_stop_a_run_but_not_a_second_one(folder):
    """Schedulers and terminals signal all processes of a run; the rank needs its batches until it has saved."""
    before = children()
    data = shard_data(f"{folder}/*.tar", num_workers=1, prefetch=1)
    batches = iter(data.loader(Layout(4), 0, 4, 0, 10**9))
    next(batches)
    (worker,) = children() - before
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
        deque(islice(batches, 20), maxlen=0)
    os.kill(worker, signal.SIGTERM)
    (error,) = (batch["error"] for batch in islice(batches, 1000) if "error" in batch)
    assert "DataLoader worker" in error
    assert "run the same command again to resume" in error


def test_a_reader_that_leaves_early_leaves_no_workers(folder):
    before = children()
    batches = iter(shard_data(f"{folder}/*.tar", num_workers=2).loader(Layout(4), 0, 4, 0, 10**9))
    next(batches)
    assert len(children() - before) == 2
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < 4  # workers are asked, not waited for in vain
    assert not children() - before


@dataclass(frozen=True)
class Resident(Field):
    """The memory of the process that decodes, in MB, now and then."""

    extensions = ("cls",)
    stored = None
    dtype = None

    def decode(self, data, out, draws):
        return resident() if draws.number % 20_000 == 0 else 0


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_the_memory_of_a_worker_is_flat_over_a_million_samples(tmp_path):
    """And of the process that takes the batches: windows, shards and their tables all come and go many times."""
    write_set(tmp_path, [150] * 200)
    fields = {"image": Number(), "memory": Resident()}
    data = shard_data(f"{tmp_path}/*.tar", fields=fields, num_workers=1, window=500)
    seen, own = {}, {}
    for batch in data.loader(Layout(1000), 0, 4, 0, 1020):
        seen |= {batch["first"] + k: m for k, m in enumerate(batch["memory"]) if m}
        own[batch["first"]] = resident()
    early, late = (
        np.median([m for n, m in seen.items() if a <= n < b]) for a, b in ((80_000, 200_000), (900_000, 1_020_000))
    )
    assert late < early + 8
    assert own[1_000_000] < own[100_000] + 8
