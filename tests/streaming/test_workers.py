"""A killed worker ends a run with one line, wherever the process is just then; an error of a worker keeps its words."""

import os
import signal
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import SMALL, command, finish
from streaming.making import Row, shard_data, write_set

from diffusion_trainer.streaming.loader import Layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, [50])
    return folder


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_in_the_middle_of_a_step_is_told_with_the_next_batch(folder, workers):
    before = children(os.getpid())
    batches = iter(shard_data(f"{folder}/*.tar", num_workers=workers).loader(Layout(4), 0, 4, 0, 10**9))
    next(batches)
    victim = min(children(os.getpid()) - before)
    os.kill(victim, signal.SIGKILL)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # a step: any of its lines may be the one that the signal meets
        time.sleep(0.001)
    last = next(batches)
    assert last["passing"], last
    assert "run the same command again to resume" in last["error"]
    assert next(batches, None) is None


def test_another_loader_is_not_told_of_it(folder):
    before = children(os.getpid())
    data = shard_data(f"{folder}/*.tar", num_workers=1)
    batches = iter(data.loader(Layout(4), 0, 4, 0, 10**9))
    next(batches)
    os.kill(*(children(os.getpid()) - before), signal.SIGKILL)
    time.sleep(0.1)
    assert not any("error" in batch for batch in data.loader(Layout(4), 0, 4, 0, 5))


@dataclass(frozen=True)
class Broken(Row):
    def decode(self, data, out, draws):
        raise RuntimeError("of a DataLoader worker (pid 1) that exited unexpectedly it only talks")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_a_worker_raises_keeps_its_traceback(folder, workers):
    data = shard_data(f"{folder}/*.tar", fields={"image": Broken()}, num_workers=workers)
    with pytest.raises(RuntimeError, match="it only talks") as caught:
        list(data.loader(Layout(4), 0, 4, 0, 2))
    assert workers == 0 or "in decode" in str(caught.value)
    # The frames hold the loader: as cyclic garbage it would end its worker by two time-outs of 5 s, in a later test.
    traceback.clear_frames(caught.tb)


def tree(pid: int) -> list[int]:
    return [pid, *(p for child in children(pid) for p in tree(child))]


def title(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_ends_with_one_line(workplace):
    """The step is slow, so that the signal comes within one."""
    process = command(
        "train", "experiment=digits", *SMALL, "strategy=single", "num_images=1000000", "batch_size=512", "lanes=1",
        "callbacks.evaluate=null", "data.num_workers=1", cwd=workplace,
    )  # fmt: skip
    end, workers = time.monotonic() + 100, []
    while not workers and time.monotonic() < end:
        time.sleep(0.2)
        with suppress(FileNotFoundError):
            ranks = [pid for pid in tree(process.pid) if b"diffusion_trainer.apps.start" in title(pid)]
            workers = [pid for rank in ranks for pid in children(rank) if title(pid) == title(rank)]  # forked
    time.sleep(3)
    os.kill(workers[0], signal.SIGKILL)
    code, output = finish(process)
    assert code == 1, output
    assert "Traceback" not in output
    assert "run the same command again to resume from it" in output
