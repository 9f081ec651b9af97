"""An evaluation puts no training at risk, and none is lost: whatever kills a run, its report is the whole one."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch

from diffusion_trainer.apps import rank
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks.evaluating import Evaluating
from diffusion_trainer.evaluation.evaluation import Interrupted
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint, latest

pytestmark = pytest.mark.filterwarnings("ignore")


class Killed(Exception):
    """Stands for SIGKILL: nothing below the trainer handles it."""


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
@pytest.mark.parametrize("at", [64, 128])
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


def test_evaluations_between_checkpoints_are_made_up_for_too(train, calls, tmp_path, whole):
    """The stop saves at the step of the evaluation, where no checkpoint is due."""
    calls[64] = interrupt
    assert train(192, "callbacks.checkpoint.every_n_images=1000") == 128 + signal.SIGINT
    assert newest(tmp_path / "run") == 64
    assert train(192) == 0
    assert report(tmp_path / "run")["history"] == whole


def test_one_at_the_start_that_was_interrupted_comes_with_the_first_step(train, calls, tmp_path):
    calls[0] = interrupt
    assert train(64) == 128 + signal.SIGINT
    assert newest(tmp_path / "run") == 32
    assert train(64) == 0
    assert calls.done == [32, 64]


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
    content = json.loads(manifest.read_text())
    assert [e["images_seen"] for e in content["state"]["evaluations"]] == [0, 64]
    content["state"]["evaluations"] = whole[:3]
    manifest.write_text(json.dumps(content))
    assert train(192) == 0
    assert calls.done == [0, 64, 128, 192]
    assert report(tmp_path / "run")["history"] == whole


def test_the_weights_are_back_in_their_place_before_a_stop_saves_them(train, calls, tmp_path):
    """The evaluation exchanges them for their averages."""
    calls[64] = interrupt
    train(128, "callbacks.checkpoint.every_n_images=1000")
    train(128, folder=tmp_path / "whole")
    path = "checkpoints/images-000000000064"
    ours, theirs = (Checkpoint(tmp_path / name / path).whole(WEIGHT) for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
