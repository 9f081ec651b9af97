"""What is logged is a function of the run, not of its interruptions."""

import csv
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import spies
import tiny
import torch
from killed import Killed, in_a_process

from diffusion_trainer.apps import rank
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks.damage import CountDamage
from diffusion_trainer.callbacks.evaluating import Evaluating
from diffusion_trainer.callbacks.metrics import LogMetrics
from diffusion_trainer.streaming.damage import Found
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
IMAGES = 224  # seven steps of 32
CLOCKED = ("train/images_per_second", "train/save_seconds")


def kill():
    raise Killed


def stop():
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def events(monkeypatch):
    """(images seen, "first" or "last" of the callbacks) -> what happens there. Two samples in each step are damaged."""
    planned = {}

    class Damaged(CountDamage):
        def __init__(self, budget, count):
            super().__init__(1.0, count, every_n_images=96)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            batch["damage"] = [Found("checksum", "x.tar", batch["first"] + i, "torn") for i in range(2)]
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

        def after_step(self, previous):
            planned.pop((self.run.images_seen, "first"), lambda: None)()
            super().after_step(previous)

    monkeypatch.setattr(rank, "CountDamage", Damaged)
    last = lambda self, previous: planned.pop((self.run.images_seen, "last"), lambda: None)()  # noqa: E731
    monkeypatch.setattr(spies.Poison, "after_step", last)
    monkeypatch.setattr(Evaluating, "_metrics", lambda self, _: {"fid": float(self.run.images_seen)})
    monkeypatch.setattr(Evaluating, "_picture", lambda *_: None)
    monkeypatch.setattr("diffusion_trainer.callbacks.evaluating.pictures.save", lambda *_: None)
    return planned


@pytest.fixture
def train(shards, tmp_path):
    """Checkpoints, evaluations and rows of the log at different places; the steps at 64 and 96 are spoiled."""

    def run(*more: str, folder: Path = tmp_path / "run") -> int:
        overrides = [
            *shards, *tiny.NETWORK, "network.attention_levels=[]", "strategy=single", "trainer.accelerator=cpu",
            f"folder='{folder}'", f"num_images={IMAGES}", "allowed_targets=[spies]",
            "+callbacks.poison={_target_: spies.Poison, first: 64, last: 128}", "callbacks.log.every_n_images=96",
            "callbacks.checkpoint.every_n_images=64", "callbacks.evaluate.every_n_images=128", *more,
        ]  # fmt: skip
        config = load("train", overrides, TrainConfig)
        folder.mkdir(exist_ok=True)
        write_config(folder, config)
        with in_a_process():
            return rank.work(config, folder, World(0, 1, 1, False))

    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [
            {key: value for key, value in row.items() if value and key not in CLOCKED} for row in csv.DictReader(file)
        ]


def told(folder: Path) -> dict:
    """All that is to be the same."""
    state = Checkpoint(latest(folder / "checkpoints")).manifest["state"]
    logged = [row for row in rows(folder / "metrics.csv") if len(row) > 1]
    return {"metrics": logged, "list": rows(folder / "damage.csv"), **{k: state[k] for k in ("guard", "damage")}}


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def whole(train, events, known, tmp_path):
    """Of a run that nothing has interrupted."""
    if not known:
        assert train(folder=tmp_path / "whole") == 0
        known |= told(tmp_path / "whole")
        skipped = [(r["images_seen"], r["train/skipped_steps"]) for r in known["metrics"] if "train/skipped_steps" in r]
        assert skipped == [("96", "1"), ("128", "2")]
        assert [r["images_seen"] for r in known["metrics"] if "data/damaged" in r] == ["96", "192", "224"]
        assert len(known["list"]) == 2 * IMAGES // 32
    return known


@pytest.mark.parametrize("event", [stop, kill])
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("images", [32, 96, 128, 160])
def test_interrupted_anywhere_it_logs_what_it_would_have_logged(train, events, tmp_path, whole, event, place, images):
    events[images, place] = event
    if event is kill:
        with pytest.raises(Killed):
            train()
    else:
        assert train() == 128 + signal.SIGTERM
    assert train() == 0
    assert told(tmp_path / "run") == whole


def test_a_step_is_agreed_on_once(train, events, tmp_path, monkeypatch):
    """Each further collective would cost every step a round trip over the network."""
    counted, per_step = [], {}
    for name in ("mean", "any", "gather"):
        original = getattr(Agreement, name)
        counting = lambda self, *a, name=name, original=original: counted.append(name) or original(self, *a)  # noqa: E731
        monkeypatch.setattr(Agreement, name, counting)

    def note(self, previous):
        per_step[self.run.images_seen], counted[:] = list(counted), []

    monkeypatch.setattr(spies.Poison, "after_step", note)
    assert train("callbacks.checkpoint.every_n_images=1000", "callbacks.evaluate=null") == 0
    assert per_step[64] == per_step[128] == per_step[160] == ["mean"]


def test_how_long_a_save_took_is_in_the_log_and_in_the_next_checkpoint(train, events, tmp_path):
    assert train("callbacks.checkpoint.keep=9", "callbacks.log.every_n_images=32") == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        logged = {int(row["images_seen"]): row["train/save_seconds"] for row in csv.DictReader(file)}
    assert not logged[32]
    assert float(logged[224]) > 0
    seconds = [
        Checkpoint(tmp_path / "run" / "checkpoints" / f"images-{n:012d}").manifest["state"].get("save_seconds")
        for n in (64, 128, 192)
    ]
    assert seconds[0] is None
    assert min(seconds[1:]) > 0


def test_where_saves_are_close_one_is_from_before_the_guard_can_notice_a_spike(train, events, tmp_path):
    assert train("callbacks.guard.recent=3", "callbacks.checkpoint.every_n_images=32") == 0
    there = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "run" / "checkpoints").glob("images-*"))
    assert there[0] <= IMAGES - 4 * 32
    assert there[-2:] == [IMAGES - 32, IMAGES]


def logs_on(rank: int, all_sums: list, state: dict) -> LogMetrics:
    """The callback of a rank that (re)starts; its peers have what is in `all_sums`."""
    log = LogMetrics(1000)
    agreement = SimpleNamespace(rank=rank, world=len(all_sums), gather=lambda mine: all_sums)
    log.run = SimpleNamespace(state=state, agreement=agreement, aside_seconds=0.0, images_seen=32)
    log.start()
    return log


def test_means_that_are_not_yet_logged_go_on_bitwise_on_as_many_ranks_and_as_means_on_others():
    sums, state = [[0.1, 1 / 3], [0.7, 2 / 3]], {}
    before = [logs_on(rank, sums, state) for rank in (0, 1)]
    for log, mine in zip(before, sums, strict=True):
        log._sums, log._steps = torch.tensor(mine), 3
    before[0].before_save()
    state = json.loads(json.dumps(state))
    after = [logs_on(rank, sums, state) for rank in (0, 1)]
    assert all(torch.equal(a._sums, b._sums) and a._steps == 3 for a, b in zip(after, before, strict=True))
    alone = logs_on(0, [None], state)
    assert torch.allclose(alone._sums, torch.tensor([0.4, 0.5]))
