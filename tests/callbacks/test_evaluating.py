"""An evaluation puts no training at risk, and none is lost: whatever kills a run, its report is the whole one."""

import csv
import json
import shutil
import signal
import threading
from pathlib import Path

import pytest
import tiny
import torch
from cases import each
from killed import Killed, in_a_process

from diffusion_trainer.apps import rank
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks import evaluating
from diffusion_trainer.callbacks.evaluating import Evaluating
from diffusion_trainer.evaluation.evaluation import Interrupted
from diffusion_trainer.training import saving
from diffusion_trainer.training.checkpoint_files import sealed
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint, latest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Calls(dict):
    def __init__(self):
        self.done: list[int] = []


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def calls(monkeypatch):
    """Images seen -> what happens in the evaluation then; all evaluations that came to their end are in `done`."""
    planned = Calls()

    def metrics(self, generator):
        seen = self.run.images_seen
        if seen in planned:
            planned.pop(seen)(self.run)
        planned.done.append(seen)
        return {"fid": sum(p.double().sum().item() for p in self.run.module.model.parameters())}

    monkeypatch.setattr(Evaluating, "_metrics", metrics)
    monkeypatch.setattr(Evaluating, "_picture", lambda self, generator: None)
    monkeypatch.setattr("diffusion_trainer.callbacks.evaluating.pictures.save", lambda *_: None)
    return planned


@pytest.fixture
def train(shards, tmp_path):
    """train(images, *overrides) -> exit code, in this process; a checkpoint and an evaluation every 64 images."""

    def run(images: int, *more: str, folder: Path = tmp_path / "run") -> int:
        overrides = [
            *shards, *tiny.NETWORK, "network.attention_levels=[]", "strategy=single", "trainer.accelerator=cpu",
            f"folder='{folder}'", f"num_images={images}", "callbacks.log=null", "callbacks.evaluate.every_n_images=64",
            "callbacks.checkpoint.every_n_images=64", *more,
        ]  # fmt: skip
        config = load("train", overrides, TrainConfig)
        folder.mkdir(exist_ok=True)
        write_config(folder, config)
        with in_a_process():
            return rank.work(config, folder, World(0, 1, 1, False))

    return run


def report(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def newest(folder: Path) -> int:
    return int(latest(folder / "checkpoints").name.removeprefix("images-"))


def kill(run):
    raise Killed


def interrupt(run):
    run.stop_signal = signal.SIGINT
    raise Interrupted


@pytest.fixture(scope="module")
def known():
    return []


@pytest.fixture
def whole(train, calls, known, tmp_path):
    """The history of a run that nothing has interrupted."""
    if not known:
        assert train(192, folder=tmp_path / "whole") == 0
        known += report(tmp_path / "whole")["history"]
        assert [h["images_seen"] for h in known] == [0, 64, 128, 192]
        calls.done.clear()
    return known


@pytest.mark.parametrize("at", [64, 192])
def test_what_was_trained_before_an_evaluation_that_dies_is_saved(train, calls, tmp_path, whole, at):
    calls[at] = kill
    with pytest.raises(Killed):
        train(192)
    assert newest(tmp_path / "run") == at
    assert [h["images_seen"] for h in report(tmp_path / "run")["history"]] == list(range(0, at, 64))


@pytest.mark.parametrize("end", [kill, interrupt])
@pytest.mark.parametrize("at", [64, 128, 192])
def test_an_evaluation_that_never_ended_is_made_up_for_and_no_other_repeated(train, calls, tmp_path, whole, at, end):
    calls[at] = end
    if end is kill:
        with pytest.raises(Killed):
            train(192)
    else:
        assert train(192) == 128 + signal.SIGINT
    assert newest(tmp_path / "run") == at  # not a step later
    assert train(192) == 0
    assert calls.done == [0, 64, 128, 192]
    assert report(tmp_path / "run")["history"] == whole
    assert report(tmp_path / "run")["metrics"] == {"fid": whole[-1]["fid"]}
    assert report(tmp_path / "run")["images_seen"] == 192


def test_an_evaluation_does_not_wait_for_the_checkpoint_of_its_step(train, calls, tmp_path, monkeypatch, whole):
    """That is written meanwhile, as it was copied before: of the weights, not of the averages in their place."""
    evaluating, write = threading.Event(), saving.write

    def wait_and_write(*arguments):
        assert evaluating.wait(60)
        return write(*arguments)

    def look(run):
        there.append((latest(run.folder / "checkpoints"), run.images_seen))
        evaluating.set()
        run.settle()
        there.append(latest(run.folder / "checkpoints").name)

    there = []
    calls[64] = look
    monkeypatch.setattr(saving, "write", wait_and_write)
    assert train(64) == 0
    assert there == [(None, 64), "images-000000000064"]
    assert train(64, "callbacks.evaluate=null", folder=tmp_path / "other") == 0
    path = "checkpoints/images-000000000064"
    ours, theirs = (Checkpoint(tmp_path / name / path) for name in ("run", "other"))
    assert all(torch.equal(t, theirs.whole(k)[n]) for k in ours.kinds for n, t in ours.whole(k).items())


def files(folder: Path) -> dict[str, bytes]:
    """All of the checkpoints."""
    return {str(p): p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}


def rows(folder: Path, column: str) -> list[int]:
    """Images seen in each row of metrics.csv that has a number in the column."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [int(row["images_seen"]) for row in csv.DictReader(file) if row[column]]


LOGGED = "callbacks.log={_target_: diffusion_trainer.callbacks.metrics.LogMetrics, every_n_images: 32}"


@pytest.mark.parametrize("end", [kill, interrupt])
def test_the_last_evaluation_is_made_up_for_without_a_step(train, calls, tmp_path, whole, capsys, end):
    """Again and again, until it has come to its end; then there is nothing to do."""
    run = tmp_path / "run"
    before = []
    for _ in range(2):
        calls[192] = end
        if end is kill:
            with pytest.raises(Killed):
                train(192, LOGGED)
        else:
            assert train(192, LOGGED) == 128 + signal.SIGINT
        assert report(run)["images_seen"] == 128
        before.append(files(run))
        assert rows(run, "eval/fid") == [0, 64, 128]
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert train(192, LOGGED) == 0
    assert "already at" not in capsys.readouterr().out
    for _ in range(2):
        assert calls.done == [0, 64, 128, 192]
        assert report(run)["history"] == whole
        assert rows(run, "eval/fid") == [0, 64, 128, 192]
        assert rows(run, "train/loss") == list(range(32, 193, 32))
        assert files(run) == before[0] == before[1]
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert train(192, LOGGED) == 0
        assert "already at 192 images" in capsys.readouterr().out


def test_a_run_killed_while_it_writes_its_last_pictures_has_one_row_of_them(train, calls, tmp_path, monkeypatch):
    """Pictures may go over a network: what is logged comes after them, beside the report."""

    def dies(*_):
        raise Killed

    train(64)
    with monkeypatch.context() as patch:
        patch.setattr("diffusion_trainer.callbacks.evaluating.pictures.save", dies)
        with pytest.raises(Killed):
            train(128)
    assert train(128) == 0
    assert calls.done == [0, 64, 128, 128]
    assert rows(tmp_path / "run", "eval/fid") == [0, 64, 128]


def test_one_that_was_interrupted_and_made_up_for_is_not_repeated_after_a_kill(train, calls, tmp_path, whole):
    """The checkpoint still says that it was interrupted."""
    calls[64] = interrupt
    train(192, "callbacks.checkpoint.every_n_images=1000")
    calls[128] = kill
    with pytest.raises(Killed):
        train(192, "callbacks.checkpoint.every_n_images=1000")
    assert newest(tmp_path / "run") == 64
    assert train(192) == 0
    assert calls.done == [0, 64, 128, 192]
    assert report(tmp_path / "run")["history"] == whole


def test_a_run_without_evaluations_owes_none(train, calls, tmp_path, capsys):
    for _ in range(2):
        assert train(64, "callbacks.evaluate=null") == 0
    assert "already at 64 images" in capsys.readouterr().out
    assert calls.done == []


def test_evaluations_between_checkpoints_are_made_up_for_too(train, calls, tmp_path, whole):
    """The stop saves at the step of the evaluation, where no checkpoint is due."""
    calls[64] = interrupt
    assert train(192, "callbacks.checkpoint.every_n_images=1000") == 128 + signal.SIGINT
    assert newest(tmp_path / "run") == 64
    assert train(192) == 0
    assert report(tmp_path / "run")["history"] == whole


def test_one_at_the_start_that_was_interrupted_is_made_up_for_before_the_first_step(train, calls, tmp_path, whole):
    """It is of the untrained weights."""
    calls[0] = interrupt
    assert train(192) == 128 + signal.SIGINT
    assert latest(tmp_path / "run" / "checkpoints") is None
    assert train(192) == 0
    assert calls.done == [0, 64, 128, 192]
    assert report(tmp_path / "run")["history"] == whole


def test_one_that_is_interrupted_again_where_it_is_made_up_for_waits_at_those_weights(train, calls, tmp_path, whole):
    for _ in range(2):
        calls[64] = interrupt
        assert train(192) == 128 + signal.SIGINT
        assert newest(tmp_path / "run") == 64
        assert calls.done == [0]
    assert train(192) == 0
    assert calls.done == [0, 64, 128, 192]
    assert report(tmp_path / "run")["history"] == whole


def test_the_last_evaluation_of_a_run_that_goes_on_is_not_repeated(train, calls, tmp_path, whole):
    assert train(96) == 0  # 96 is no multiple of 64: evaluated and saved as the end
    assert train(192) == 0
    assert calls.done == [0, 64, 96, 128, 192]
    history = report(tmp_path / "run")["history"]
    assert [h["images_seen"] for h in history] == calls.done
    assert [h for h in history if h["images_seen"] != 96] == whole


def test_from_an_earlier_checkpoint_what_came_later_is_evaluated_again(train, calls, tmp_path, whole):
    assert train(192, "callbacks.checkpoint.keep=9") == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "images-000000000192")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "images-000000000128")
    assert train(192) == 0
    assert calls.done == [0, 64, 128, 192, 128, 192]
    assert report(tmp_path / "run")["history"] == whole


def test_a_checkpoint_of_the_order_before_has_its_history_in_its_state(train, calls, tmp_path, whole):
    assert train(128) == 0
    (tmp_path / "run" / "metrics.json").unlink()
    manifest = latest(tmp_path / "run" / "checkpoints") / "manifest.json"
    content = {k: v for k, v in json.loads(manifest.read_text()).items() if k != "crc32"}
    assert [e["images_seen"] for e in content["state"]["evaluations"]] == [0, 64]
    content["state"]["evaluations"] = whole[:3]
    manifest.write_text(sealed(content))
    assert train(192) == 0
    assert calls.done == [0, 64, 128, 192]
    assert report(tmp_path / "run")["history"] == whole


DAMAGED = [
    "", "{", "[]", "{}", '{"history": 7}', '{"history": [7]}', '{"history": "abc"}', '{"history": [{}]}',
    '{"history": [{"images_seen": "a"}]}', '{"history": [{"images_seen": Infinity}]}', "[" * 100_000,
]  # fmt: skip


@each("text", {text[:30]: text for text in DAMAGED})
def test_a_damaged_report_is_no_history(tmp_path, text, capsys):
    (tmp_path / "metrics.json").write_text(text)
    assert evaluating._written(tmp_path) == []
    assert "metrics.json is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"history": [7]}'])
def test_a_damaged_report_is_told_and_made_again(train, calls, tmp_path, whole, text, capsys):
    assert train(128) == 0
    (tmp_path / "run" / "metrics.json").write_text(text)
    assert train(192) == 0
    assert "metrics.json is damaged" in capsys.readouterr().out
    assert report(tmp_path / "run")["history"] == whole


def test_the_weights_are_back_in_their_place_before_a_stop_saves_them(train, calls, tmp_path):
    """The evaluation exchanges them for their averages."""
    calls[64] = interrupt
    train(128, "callbacks.checkpoint.every_n_images=1000")
    train(128, folder=tmp_path / "whole")
    path = "checkpoints/images-000000000064"
    ours, theirs = (Checkpoint(tmp_path / name / path).whole(WEIGHT) for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
