"""Runs that are told to stop, or end: what is saved then, what is said, and that nothing is left."""

import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from saved_runs import At64, failing, named, names, overrides, run, shards, tensors  # noqa: F401 (fixtures)

from diffusion_trainer.apps import processes, rank
from diffusion_trainer.callbacks.checkpointing import STOP_SIGNALS, Checkpointing
from diffusion_trainer.callbacks.last_words import RankFiles
from diffusion_trainer.callbacks.run import FIRST, Run, RunCallback

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def hangup():
    """SIGHUP as it is without nohup, under which a run leaves it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_waits_until_its_checkpoint_is_there(run, tmp_path, monkeypatch, number):
    monkeypatch.setattr(rank, "CountDamage", lambda *_: At64(lambda run: signal.raise_signal(number)))
    handlers = [signal.getsignal(s) for s in STOP_SIGNALS]
    assert run(160, "callbacks.checkpoint.every_n_images=1000") == 128 + number
    assert names(tmp_path / "run") == [*named(64), "latest"]
    assert not [thread for thread in threading.enumerate() if thread.name in ("checkpoint", "watchdog")]
    assert [signal.getsignal(s) for s in STOP_SIGNALS] == handlers


class WhileLoggersWrite(RunCallback):
    """Signals this process once the training has ended, before Lightning closes the loggers."""

    def teardown(self, trainer, module, stage):
        self.handled = signal.getsignal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_after_all_is_saved_lets_the_loggers_write_what_they_have(run, monkeypatch):
    """The next start would find the run done, and never make up for what they lack."""
    late, handler = WhileLoggersWrite(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(rank, "CountDamage", lambda *_: late)
    assert run(64) == 0
    assert late.handled not in (handler, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_ctrl_c_after_another_stop_leaves_the_save_its_time(run, tmp_path, monkeypatch):
    def both(_) -> None:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(rank, "CountDamage", lambda *_: At64(both))
    assert run(160, "callbacks.checkpoint.every_n_images=1000") == 128 + signal.SIGINT
    assert names(tmp_path / "run") == [*named(64), "latest"]


def test_a_stop_file_stops_once_and_then_the_run_goes_on_as_if_nothing_had_been(run, tmp_path, monkeypatch):
    assert run(160, folder=tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(rank, "CountDamage", lambda *_: At64(lambda run: (run.folder / "stop").touch()))
        patch.setattr("diffusion_trainer.callbacks.run.STOP_SECONDS", 0)
        assert run(160, "callbacks.checkpoint.every_n_images=1000") == 128 + signal.SIGTERM
    assert names(tmp_path / "run") == [*named(64), "latest"]
    assert not (tmp_path / "run" / "stop").exists()
    assert run(160) == 0
    ours, theirs = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_stop_file_that_comes_with_the_last_step_is_not_the_next_starts(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rank, "CountDamage", lambda *_: At64(lambda run: (run.folder / "stop").touch()))
        assert run(64) == 0
    assert not (tmp_path / "run" / "stop").exists()
    assert run(96) == 0


@pytest.mark.parametrize("ends", ["a signal", "a rollback"])
def test_a_stop_file_outlives_what_the_run_goes_on_after_by_itself(run, tmp_path, monkeypatch, ends):
    """Preempted, and back in the queue; or back to an earlier checkpoint: the next start is told to stop as well."""

    def both(run) -> None:
        (run.folder / "stop").touch()
        if ends == "a signal":
            signal.raise_signal(signal.SIGUSR1)
        else:
            run.stopping = run.rolled_back = run.trainer.should_stop = True

    monkeypatch.setattr(rank, "CountDamage", lambda *_: At64(both))
    assert run(160) == (128 + signal.SIGUSR1 if ends == "a signal" else processes.ROLLED_BACK)
    assert (tmp_path / "run" / "stop").exists()


@pytest.mark.parametrize(("times", "saved"), [(1, 64), (9, 32)])
def test_a_stop_tries_a_save_that_fails_once_more_and_says_what_is_saved(
    run, tmp_path, monkeypatch, capsys, times, saved
):
    tried = failing(monkeypatch, 64, times)
    monkeypatch.setattr(rank, "CountDamage", lambda *_: At64(lambda run: signal.raise_signal(signal.SIGTERM)))
    assert run(160) == 128 + signal.SIGTERM
    assert names(tmp_path / "run") == [*named(*sorted({32, saved})), "latest"]
    said = capsys.readouterr().out
    assert (len(tried), said.count("WARNING")) == (2, 1)
    assert ("stopped at 64 images, 32 of them saved; run" in said) == (saved == 32)
    assert ("stopped at 64 images; run" in said) == (saved == 64)


class FullDisk:
    """In a Saver's place."""

    begun = 0

    def begin(self, images_seen, state):
        self.begun += 1

    def wait(self):
        if self.begun:
            raise OSError("No space left on device")


@pytest.mark.parametrize("signals", [(None, None), (signal.SIGTERM, None), (None, signal.SIGTERM)])
@pytest.mark.parametrize("mine", [0, 1])
def test_ranks_do_the_same_at_the_end_when_a_signal_has_come_to_one_alone(tmp_path, monkeypatch, signals, mine):
    """Too late for them to agree on after a step: else one would save, and wait for the other."""
    disk, module = FullDisk(), SimpleNamespace(images_seen=96)
    monkeypatch.setattr("diffusion_trainer.callbacks.checkpointing.Saver", lambda *_, **__: disk)
    agreement = SimpleNamespace(rank=mine, gather=lambda _: list(signals))
    trainer = SimpleNamespace(callbacks=[], loggers=[])
    checkpointing = Checkpointing(32)
    run = checkpointing.run = Run(tmp_path, module, trainer, agreement, None, None, None, saved_at=64)
    checkpointing.start()
    try:
        run.stop_signal = signals[mine]
        checkpointing.on_train_end(trainer, module)
    finally:
        checkpointing.close()
    stopped = signal.SIGTERM in signals
    assert (disk.begun, run.stop_signal, run.failure is None) == (1, signal.SIGTERM if stopped else None, stopped)


def test_a_run_leaves_nothing_of_its_heartbeat(run, tmp_path):
    assert run(64) == 0
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["attempt-1"]
    handler = signal.getsignal(signal.SIGTERM)
    assert run(96) == 0
    assert signal.getsignal(signal.SIGTERM) is handler


class Looks(RunCallback):
    """Comes to its start before all others but what begins the run."""

    turn = FIRST

    def start(self):
        self.handlers = [signal.getsignal(s) for s in STOP_SIGNALS]


def test_until_the_run_can_save_a_stop_is_just_the_end_and_no_handler_talks_to_other_ranks(run, monkeypatch):
    looks, before = Looks(), [signal.getsignal(s) for s in STOP_SIGNALS]
    monkeypatch.setattr(rank, "CountDamage", lambda *_: looks)
    assert run(32) == 0
    assert looks.handlers == before


def test_an_error_of_a_run_leaves_its_last_words(run, tmp_path, monkeypatch):
    def fail(run):
        raise ZeroDivisionError("at once")

    monkeypatch.setattr(rank, "CountDamage", lambda *_: At64(fail))
    with pytest.raises(ZeroDivisionError):
        run(160)
    words = RankFiles(tmp_path / "run" / "logs", 0).failed.read_text()
    assert "at step 2, 64 images (a training step):\nZeroDivisionError: at once" in words
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
