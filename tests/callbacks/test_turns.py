"""What a run computes and keeps does not depend on the order of conf/callbacks."""

from itertools import permutations
from pathlib import Path

import pytest
import tiny
import torch
from options import built

from diffusion_trainer.apps import rank
from diffusion_trainer.apps import train as parent
from diffusion_trainer.apps.config import load, read
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks import damage, ema_snapshots, observing, scaling  # noqa: F401 (all that there are)
from diffusion_trainer.callbacks.csv_logger import read_rows
from diffusion_trainer.callbacks.run import SAVE, RunCallback, in_turn
from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.slow

CLOCKED = ("train/images_per_second", "train/save_seconds")


def test_every_order_of_the_configuration_gives_the_same_turns():
    (callbacks,) = built("callbacks").values()
    orders = {tuple(in_turn(order)) for order in permutations(callbacks.values())}
    assert [type(c).__name__ for c in next(iter(orders))] == [
        "Guarding", "LogMetrics", "Checkpointing", "Evaluating", "Heartbeat",
    ]  # fmt: skip
    assert len(orders) == 1


def test_whatever_keeps_something_in_a_checkpoint_has_its_turn_before_it():
    ours = [c for c in RunCallback.__subclasses__() if c.__module__.startswith("diffusion_trainer.")]
    keeping = [c for c in ours if c.before_save is not RunCallback.before_save]
    assert {c.__name__ for c in keeping} >= {"Guarding", "LogMetrics", "CountDamage", "Scaling"}
    assert all(c.turn < SAVE for c in keeping)


@pytest.fixture
def train(tmp_path):
    shards = tiny.overrides(tmp_path / "shards")

    def run(folder: Path, turned: bool, *more: str) -> dict:
        overrides = [
            *shards, *tiny.NETWORK, "network.attention_levels=[]", "strategy=single", "trainer.accelerator=cpu",
            f"folder='{folder}'", "num_images=160", "callbacks.log.every_n_images=96", "sampler.num_steps=2",
            "callbacks.checkpoint.every_n_images=64", "callbacks.checkpoint.keep=9",
            "callbacks.evaluate.every_n_images=64", "callbacks.evaluate.at_start=false",
            *more,
        ]  # fmt: skip
        config = load("train", overrides, TrainConfig)
        if turned:
            config["callbacks"] = dict(reversed(config["callbacks"].items()))
        folder.mkdir()
        write_config(folder, config)
        assert rank.work(config, folder, World(0, 1, 1, False)) == 0
        return kept(folder)

    return run


def kept(folder: Path) -> dict:
    """Of every checkpoint the state, without what a clock has said, and of the last one the tensors."""
    found = [Checkpoint(path) for path in sorted((folder / "checkpoints").glob("images-*"))]
    states = [{k: v for k, v in c.manifest["state"].items() if k not in ("run_id", "save_seconds")} for c in found]
    rows = [{k: v for k, v in row.items() if k not in CLOCKED} for row in read_rows(folder / "metrics.csv")]
    return {"states": states, "rows": rows, "tensors": tensors(Checkpoint(latest(folder / "checkpoints")))}


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {f"{kind}/{n}": t for kind in checkpoint.kinds for n, t in checkpoint.whole(kind).items()}


@pytest.mark.filterwarnings("ignore")
def test_a_run_whose_callbacks_stand_the_other_way_round_keeps_the_same(train, tmp_path):
    ours, theirs = train(tmp_path / "one", turned=False), train(tmp_path / "two", turned=True)
    assert ours["states"] == theirs["states"]
    assert ours["rows"] == theirs["rows"]
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    assert all(torch.equal(ours["tensors"][k], t) for k, t in theirs["tensors"].items())


@pytest.mark.filterwarnings("ignore")
def test_lightnings_own_callbacks_are_taken(train, tmp_path):
    timer = "+callbacks.timer._target_=lightning.pytorch.callbacks.Timer"
    modules = "allowed_targets=[lightning.pytorch.callbacks]"
    train(tmp_path / "run", False, modules, timer, "+callbacks.timer.verbose=false", "evaluation=none")


@pytest.mark.filterwarnings("ignore")
def test_what_a_run_adds_has_its_turn_among_the_others(train, tmp_path, monkeypatch):
    orders = []
    monkeypatch.setattr(rank, "in_turn", lambda callbacks: orders.append(in_turn(callbacks)) or orders[-1])
    train(tmp_path / "run", False, "timesteps=loss_second_moment", "callbacks.evaluate=null")
    names = [type(c).__name__ for c in orders[0]]
    assert names == ["Guarding", "CountDamage", "Observing", "LogMetrics", "Checkpointing", "Heartbeat"]


@pytest.mark.filterwarnings("ignore")
def test_a_start_that_finds_nothing_to_do_takes_no_attempt(train, tmp_path):
    train(tmp_path / "run", False, "callbacks.evaluate=null")
    config = read(tmp_path / "run" / "config.yaml")
    for _ in range(2):
        assert rank.work(config, tmp_path / "run", World(0, 1, 1, False)) == 0
        assert parent._run(config, tmp_path / "run", None) == 0
        (tmp_path / "run" / "logs" / "failed-rank-0.txt").write_text("of the crash before")
    assert sorted(p.name for p in (tmp_path / "run" / "logs").iterdir()) == ["attempt-1", "failed-rank-0.txt"]
