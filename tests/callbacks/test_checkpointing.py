"""Checkpoints in runs: written while training goes on, and a run goes on from the newest that is whole."""

import shutil
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from saved_runs import failing, logged, named, names, overrides, run, shards, tensors  # noqa: F401 (fixtures)

from diffusion_trainer.apps import initial, rank, train
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.callbacks.checkpointing import Checkpointing
from diffusion_trainer.callbacks.run import SAVE_TIMEOUT_SECONDS, RunCallback
from diffusion_trainer.callbacks.watchdog import Watchdog
from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.training import saving
from diffusion_trainer.training.checkpoints import latest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
FILE = "rank-00000.safetensors"


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


@pytest.mark.parametrize(("images", "times", "end"), [(64, 9, FINE), (96, 1, FINE), (96, 9, LACKING)])
def test_one_that_cannot_be_written_is_told_at_the_next_step_and_training_goes_on(
    run, tmp_path, monkeypatch, capsys, images, times, end
):
    """The last one is tried twice, and told once. If it is lacking at the end, the run has not come to its end: it says
    so when every callback has had its turn.
    """
    tried = failing(monkeypatch, images, times)
    last = AtTheEnd()
    monkeypatch.setattr(rank, "CountDamage", lambda *_: last)
    with end:
        assert run(96) == 0
    assert last.ended
    said = capsys.readouterr().out
    assert len(tried) == (1 if images == 64 else 2)
    assert said.count("WARNING") == 1
    assert "could not be written: No space left on device; the one before it is intact" in said
    lacking = {images} if times > 1 else set()
    assert names(tmp_path / "run") == [*named(*sorted({32, 64, 96} - lacking)), "latest"]
    monkeypatch.undo()
    assert run(96) == 0
    assert names(tmp_path / "run")[-2:] == [*named(96), "latest"]


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
