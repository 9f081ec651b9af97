"""Who tells a run to stop, and how often it looks."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from diffusion_trainer.apps import processes
from diffusion_trainer.callbacks import run as runs
from diffusion_trainer.callbacks.checkpointing import STOP_SIGNALS, signals_to_stop
from diffusion_trainer.callbacks.job_starts import STOP, JobStart
from diffusion_trainer.callbacks.run import STOP_SECONDS, Run


class Folder:
    """Counts the requests to its file system."""

    def __init__(self):
        self.looks, self.there = 0, False

    def __truediv__(self, name: str) -> "Folder":
        assert name == STOP
        return self

    def exists(self) -> bool:
        self.looks += 1
        return self.there


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(runs, "monotonic", lambda: clock.now)
    return clock


def of_rank(rank: int, folder) -> Run:
    return Run(folder, None, None, SimpleNamespace(rank=rank), None, None, None)


def test_rank_0_looks_for_the_stop_file_every_few_seconds_and_the_others_never(clock):
    folders = Folder(), Folder()
    ours = [of_rank(rank, folder) for rank, folder in enumerate(folders)]
    for _ in range(1000):  # steps of 10 ms
        assert [run.told_to_stop() for run in ours] == [False, False]
        clock.now += 0.01
    assert folders[0].looks == 1 + int(9.99 / STOP_SECONDS)  # the first step's look is one of them
    assert folders[1].looks == 0


def test_it_is_seen_in_time_and_then_no_longer_looked_for(clock):
    folder = Folder()
    run = of_rank(0, folder)
    assert not run.told_to_stop()
    folder.there = True
    clock.now += STOP_SECONDS / 2
    assert not run.told_to_stop()
    clock.now += STOP_SECONDS / 2
    assert run.told_to_stop()
    assert run.stop_signal == signal.SIGTERM
    for _ in range(10):
        clock.now += STOP_SECONDS
        assert run.told_to_stop()
    assert folder.looks == 2


def test_a_signal_needs_no_look(clock):
    folder = Folder()
    run = of_rank(0, folder)
    run.stop_signal = signal.SIGHUP
    assert run.told_to_stop()
    assert folder.looks == 0


def test_a_terminal_that_goes_stops_a_run_unless_that_was_ruled_out():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert signal.SIGHUP in signals_to_stop()
        assert signals_to_stop() == list(STOP_SIGNALS)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        assert signals_to_stop() == [s for s in STOP_SIGNALS if s != signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


CHILD = """
import signal, sys, time
got = []
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
open(sys.argv[1], "w").close()
while signal.SIGTERM not in got:
    time.sleep(0.01)
time.sleep(0.5)  # the save
open(sys.argv[1] + "-saved", "w").close()
sys.exit(128 + got[0])
"""


def test_a_terminal_that_goes_and_then_a_stop_leave_the_save_its_time(tmp_path):
    """A third signal kills; SIGHUP, which may come more than once, does not count."""
    ready = tmp_path / "ready"

    def send() -> None:
        while not ready.exists():
            time.sleep(0.01)
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert processes.spawn(["-c", CHILD, str(ready)], 1, tmp_path / "logs") == 128 + signal.SIGHUP
    finally:
        sender.join()
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "ready-saved").exists()


def test_without_checkpoints_a_stop_ends_the_run_unsaved(tmp_path):
    (tmp_path / STOP).touch()
    trainer = SimpleNamespace(should_stop=False)
    run = Run(tmp_path, None, trainer, SimpleNamespace(rank=0, gather=lambda mine: [mine]), None, None, None)
    assert run.told_to_stop()
    run.stop()
    assert (run.stopping, trainer.should_stop, run.stop_signal) == (True, True, signal.SIGTERM)
    assert not (tmp_path / STOP).exists()


@pytest.mark.parametrize(("other", "obeyed"), [(("77", 1), True), (("77", 0), False), (("78", 1), False)])
def test_what_tells_another_start_to_stop_does_not_stop_this_one(tmp_path, monkeypatch, other, obeyed):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    JobStart(*other).stop_file(tmp_path).touch()
    assert of_rank(0, tmp_path).told_to_stop() == obeyed
    (tmp_path / STOP).touch()
    assert of_rank(0, tmp_path).told_to_stop()  # by hand, it is for whoever trains there
