"""Checkpoints in runs: written while training goes on, and a run goes on from the newest that is whole."""

import csv
import shutil
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from diffusion_trainer.apps import initial, processes, rank, train
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks.checkpointing import SAVE_TIMEOUT_SECONDS, STOP_SIGNALS, Checkpointing
from diffusion_trainer.callbacks.last_words import RankFiles
from diffusion_trainer.callbacks.run import FIRST, Run, RunCallback
from diffusion_trainer.callbacks.watchdog import Watchdog
from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.training import saving
from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.filterwarnings("ignore")
FILE = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def overrides(shards):
    return [
        *shards, *tiny.NETWORK, "network.attention_levels=[]", "strategy=single", "trainer.accelerator=cpu",
        "callbacks.evaluate=null", "callbacks.checkpoint.every_n_images=32", "callbacks.checkpoint.keep=9",
        "callbacks.log={_target_: diffusion_trainer.callbacks.metrics.LogMetrics, every_n_images: 32}",
    ]  # fmt: skip


@pytest.fixture
def run(overrides, tmp_path):
    """run(images, *overrides) -> exit code, in this process; a checkpoint each step of 32 images."""

    def run(images: int, *more: str, folder: Path = tmp_path / "run") -> int:
        config = load("train", [*overrides, f"folder='{folder}'", f"num_images={images}", *more], TrainConfig)
        folder.mkdir(exist_ok=True)
        write_config(folder, config)
        return rank.work(config, folder, World(0, 1, 1, False))

    return run


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def named(*images: int) -> list[str]:
    return [f"images-{n:012d}" for n in images]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = Checkpoint(latest(folder / "checkpoints"))
    return {f"{kind}/{n}": t for kind in found.kinds for n, t in found.whole(kind).items()}


def logged(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [int(row["images_seen"]) for row in csv.DictReader(file)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_run_goes_on_from_the_one_before_and_ends_the_same(run, tmp_path, capsys, damage):
    assert run(160, folder=tmp_path / "whole") == 0
    assert run(96) == 0
    damage(tmp_path / "run" / "checkpoints" / named(96)[0] / FILE)
    capsys.readouterr()
    assert run(160) == 0
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1
    assert f"{named(96)[0]}/{FILE} is damaged" in said
    assert f"It is aside-{named(96)[0]} now; going on from {named(64)[0]}, the one before" in said
    ours, theirs = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert names(tmp_path / "run") == ["aside-" + named(96)[0], *named(32, 64, 96, 128, 160), "latest"]
    assert logged(tmp_path / "run") == logged(tmp_path / "whole") == [32, 64, 96, 128, 160]


def test_a_run_without_a_whole_one_is_refused_with_all_names(run, tmp_path):
    assert run(64) == 0
    for name in named(32, 64):
        flip(tmp_path / "run" / "checkpoints" / name / FILE)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole") as caught:
        run(96)
    assert all(f"{name}/{FILE}" in str(caught.value) for name in named(32, 64))
    assert names(tmp_path / "run") == [*named(32, 64), "latest"]


def test_a_damaged_one_that_is_named_is_refused(run, tmp_path):
    """By sample, evaluate, export, init_from, ...: all read through the same class."""
    assert run(64) == 0
    flip(tmp_path / "run" / "checkpoints" / named(64)[0] / FILE)
    for named_as in (tmp_path / "run", tmp_path / "run" / "checkpoints" / named(64)[0]):
        with pytest.raises(UserError, match=f"{named(64)[0]}/{FILE} is damaged"):
            initial.of(str(named_as))
    assert initial.of(str(tmp_path / "run" / "checkpoints" / named(32)[0]))


def test_the_checks_before_a_run_pass_over_a_damaged_one(run, overrides, tmp_path, capsys):
    assert run(64) == 0
    (tmp_path / "run" / "checkpoints" / named(64)[0] / "manifest.json").write_text("{")
    config = load("train", [*overrides, f"folder='{tmp_path}/run'", "num_images=64"], TrainConfig)
    train.preflight(config, 1, tmp_path / "run")
    train.announce(config, 1, tmp_path / "run", "")
    assert f"resuming from {named(32)[0]}" in capsys.readouterr().out


def test_training_goes_on_while_a_checkpoint_is_written(run, tmp_path, monkeypatch):
    """Writing the first one waits until two more steps have been taken; the second waits for the first."""
    stepped, write = threading.Event(), saving.write
    seen, after_step = [], Checkpointing.after_step

    def wait_and_write(*arguments):
        assert stepped.wait(60)
        return write(*arguments)

    def note(self, previous):
        after_step(self, previous)
        seen.append((self.run.images_seen, len(list((tmp_path / "run" / "checkpoints").glob("images-*")))))
        if self.run.images_seen == 96:
            stepped.set()

    monkeypatch.setattr(saving, "write", wait_and_write)
    monkeypatch.setattr(Checkpointing, "after_step", note)
    assert run(192, "callbacks.checkpoint.every_n_images=64") == 0
    assert seen[:3] == [(32, 0), (64, 0), (96, 0)]
    assert names(tmp_path / "run") == [*named(64, 128, 192), "latest"]


FINE = nullcontext()
LACKING = pytest.raises(PassingError, match=r"the last checkpoint, of \d+ images, could not be written")


@pytest.mark.parametrize(("failing", "times", "end"), [(64, 9, FINE), (96, 1, FINE), (96, 9, LACKING)])
def test_one_that_cannot_be_written_is_told_at_the_next_step_and_training_goes_on(
    run, tmp_path, monkeypatch, capsys, failing, times, end
):
    """The last one is tried twice, and told once. If it is lacking at the end, the run has not come to its end: it says
    so when every callback has had its turn.
    """
    write, tried = saving.write_tensors, []

    def fail(path, tensors):
        if f"{failing:012d}" in path.parent.name:
            tried.append(path)
            if len(tried) <= times:
                raise OSError("No space left on device")
        return write(path, tensors)

    last = AtTheEnd()
    monkeypatch.setattr(rank, "CountDamage", lambda *_: last)
    monkeypatch.setattr(saving, "write_tensors", fail)
    with end:
        assert run(96) == 0
    assert last.ended
    said = capsys.readouterr().out
    assert len(tried) == (1 if failing == 64 else 2)
    assert said.count("WARNING") == 1
    assert "could not be written: No space left on device; the one before it is intact" in said
    lacking = {failing} if times > 1 else set()
    assert names(tmp_path / "run") == [*named(*sorted({32, 64, 96} - lacking)), "latest"]
    monkeypatch.setattr(saving, "write_tensors", write)
    assert run(96) == 0
    assert names(tmp_path / "run")[-2:] == [*named(96), "latest"]


@pytest.mark.parametrize(("times", "saved"), [(1, 64), (9, 32)])
def test_a_stop_tries_a_save_that_fails_once_more_and_says_what_is_saved(
    run, tmp_path, monkeypatch, capsys, times, saved
):
    write, tried = saving.write_tensors, []

    def fail(path, tensors):
        if f"{64:012d}" in path.parent.name:
            tried.append(path)
            if len(tried) <= times:
                raise OSError("No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(saving, "write_tensors", fail)
    monkeypatch.setattr(rank, "CountDamage", lambda *_: At64(lambda run: signal.raise_signal(signal.SIGTERM)))
    assert run(160) == 128 + signal.SIGTERM
    assert names(tmp_path / "run") == [*named(*sorted({32, saved})), "latest"]
    said = capsys.readouterr().out
    assert (len(tried), said.count("WARNING")) == (2, 1)
    assert ("stopped at 64 images, 32 of them saved; run" in said) == (saved == 32)
    assert ("stopped at 64 images; run" in said) == (saved == 64)


def test_an_old_one_that_cannot_be_removed_is_an_alert_and_the_save_counts(run, tmp_path, monkeypatch, capsys):
    """Nor is it in the way of the next save."""
    rmtree, written = shutil.rmtree, []

    def busy(path, ignore_errors=False):
        if path.name.endswith(".old") and not ignore_errors:
            raise OSError("Directory not empty")
        if not path.name.endswith(".old"):
            rmtree(path, ignore_errors)

    publish = saving.write_manifest
    monkeypatch.setattr(saving, "write_manifest", lambda *arguments: written.append(1) or publish(*arguments))
    monkeypatch.setattr(saving.shutil, "rmtree", busy)
    assert run(96, "callbacks.checkpoint.keep=1", "callbacks.guard=null") == 0
    said = capsys.readouterr().out
    assert [f"{name} is written, but older ones could not be removed" in said for name in named(64, 96)] == [True] * 2
    assert "could not be written" not in said
    assert len(written) == 3  # no one twice
    assert latest(tmp_path / "run" / "checkpoints").name == named(96)[0]


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


def test_it_is_told_at_the_very_next_step(run, monkeypatch, capsys):
    after_step, told = Checkpointing.after_step, {}

    def fail(*_):
        raise OSError("No space left on device")

    def note(self, previous):
        after_step(self, previous)
        if self.run.images_seen == 64:
            self._saver._thread.join()
        told[self.run.images_seen] = "WARNING" in capsys.readouterr().out

    monkeypatch.setattr(saving, "write_tensors", fail)
    monkeypatch.setattr(Checkpointing, "after_step", note)
    with LACKING:
        run(160, "callbacks.checkpoint.every_n_images=64")
    assert (told[64], told[96]) == (False, True)


class AtTheEnd(RunCallback):
    """After the checkpoints' turn."""

    ended = False

    def on_train_end(self, trainer, module):
        self.ended = True


class Saves(RunCallback):
    """Asks for a checkpoint, as what ends a run does."""

    def after_step(self, previous):
        if self.run.images_seen == 64:
            self.run.save()
            self.found = latest(self.run.folder / "checkpoints")


def test_one_that_is_asked_for_is_there_when_the_call_returns(run, tmp_path, monkeypatch):
    asks, write = Saves(), saving.write
    monkeypatch.setattr(rank, "CountDamage", lambda *_: asks)
    monkeypatch.setattr(saving, "write", lambda *arguments: time.sleep(0.3) or write(*arguments))
    assert run(96, "callbacks.checkpoint.every_n_images=1000") == 0
    assert asks.found.name == named(64)[0]


class At64(RunCallback):
    """Does something to a run after its second step."""

    turn = FIRST

    def __init__(self, what):
        self.what = what

    def after_step(self, previous):
        if self.run.images_seen == 64:
            self.what(self.run)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_waits_until_its_checkpoint_is_there(run, tmp_path, monkeypatch, number):
    handlers = [signal.getsignal(s) for s in STOP_SIGNALS]
    monkeypatch.setattr(rank, "CountDamage", lambda *_: At64(lambda run: signal.raise_signal(number)))
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


def test_the_wait_for_a_slow_disk_is_no_hang(run, tmp_path, monkeypatch):
    """Writing takes longer than hang_timeout_seconds: what is waited for is allowed SAVE_TIMEOUT_SECONDS."""
    beat, write, told = Watchdog.beat, saving.write, []
    monkeypatch.setattr(Watchdog, "beat", lambda self, *args: beat(self, *args) or told.append(args))
    monkeypatch.setattr(saving, "write", lambda *args: told.append("writing") or time.sleep(0.1) or write(*args))
    assert run(96, "callbacks.heartbeat.hang_timeout_seconds=100") == 0
    for at in [n for n, entry in enumerate(told) if entry == "writing"]:
        waits = [entry for entry in told[at + 1 :] if entry[0] == "the wait for a checkpoint"]
        assert waits[0][1] == SAVE_TIMEOUT_SECONDS
    beats = [entry for entry in told if entry != "writing"]
    after = [beats[n + 1] for n, entry in enumerate(beats) if entry[0] == "the wait for a checkpoint"]
    assert set(after) == {("what follows a step", 100), ("what follows a step", 1800)}  # 1800: until the first is over


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
