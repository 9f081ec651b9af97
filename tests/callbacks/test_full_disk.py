"""A disk that is full, or fails, is an alert; training goes on, and what it kept back is written when there is room."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from small_disks import fill, mounted

from diffusion_trainer.apps import rank
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks.checkpointing import Checkpointing
from diffusion_trainer.callbacks.csv_logger import CsvLogger, read_rows
from diffusion_trainer.callbacks.evaluating import Evaluating
from diffusion_trainer.callbacks.run import DISK, FIRST, RunCallback
from diffusion_trainer.callbacks.run_logger import RunLogger
from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.filterwarnings("ignore")
CLOCKED = ("train/images_per_second", "train/save_seconds")


class Disk(RunCallback):
    """Full from 64 images on, until 160."""

    turn = FIRST

    def after_step(self, previous):
        filler = self.run.folder / "filler"
        if self.run.images_seen == 64:
            fill(filler)
        if self.run.images_seen == 160:
            filler.unlink()
        if self.run.images_seen == 192:  # the checkpoint of 160 is there: who goes on from it does not log these again
            assert seen(self.run.folder / "metrics.csv") == ["64", "96", "128"]


class Alerts(RunLogger):
    name = "alerts"

    def __init__(self):
        super().__init__()
        self.all = []

    def log_metrics(self, metrics, step=None):
        return None

    def alert(self, title, text):
        self.all.append((title, text))


@pytest.fixture
def alerts(monkeypatch):
    logger, loggers_of = Alerts(), rank.loggers_of
    monkeypatch.setattr(rank, "loggers_of", lambda *arguments: [*loggers_of(*arguments), logger])
    return logger.all


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A run of seven steps in the folder: a checkpoint after each, an evaluation every other."""
    shards = tiny.overrides(tmp_path)
    monkeypatch.setattr(Evaluating, "_metrics", lambda self, _: {"fid": float(self.run.images_seen)})
    monkeypatch.setattr(Evaluating, "_picture", lambda *_: Image.effect_noise((64, 64), 50))

    def run(folder: Path) -> int:
        overrides = [
            *shards, *tiny.NETWORK, "network.attention_levels=[]", "strategy=single", "trainer.accelerator=cpu",
            f"folder='{folder}'", "num_images=224", "callbacks.log.every_n_images=96", "ema=several",
            "callbacks.checkpoint.every_n_images=32", "callbacks.evaluate.every_n_images=64",
            "callbacks.evaluate.at_start=false", "callbacks.checkpoint.keep=1", "callbacks.guard.recent=1",
            "+callbacks.ema_snapshots={_target_: diffusion_trainer.callbacks.ema_snapshots.EmaSnapshots, "
            "every_n_images: 96}",
        ]  # fmt: skip
        config = load("train", overrides, TrainConfig)
        folder.mkdir(exist_ok=True)
        write_config(folder, config)
        return rank.work(config, folder, World(0, 1, 1, False))

    return run


def left(folder: Path) -> dict:
    """What there is at the end."""
    rows = [{k: v for k, v in row.items() if k not in CLOCKED} for row in read_rows(folder / "metrics.csv")]
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return {"rows": rows, "history": history, "pictures": sorted(p.name for p in (folder / "samples").iterdir())}


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_trains_on_alerts_and_saves_again_once_there_is_room(
    train, alerts, tmp_path, monkeypatch
):
    assert train(tmp_path / "whole") == 0
    assert alerts == []
    monkeypatch.setattr(rank, "CountDamage", lambda *_: Disk())
    with mounted(tmp_path / "small", 8192) as folder:
        assert train(folder) == 0
        assert {title for title, _ in alerts} == {DISK}
        assert all("No space left on device" in text for _, text in alerts)
        told = [text for _, text in alerts]
        checkpoints = [n for n in range(32, 225, 32) if any(f"checkpoints/images-{n:012d} could" in t for t in told)]
        assert checkpoints == [64, 96, 128]
        assert sum("ema_snapshots/images-000000000096 could not be written" in t for t in told) == 1
        once = ("the csv log cannot", "a picture of samples cannot", "metrics.json cannot")
        assert [sum(t.startswith(what) for t in told) for what in once] == [1, 1, 1]
        assert len(told) == 7
        assert left(folder) == left(tmp_path / "whole")
        assert len(left(folder)["pictures"]) == 4
        ours, theirs = (Checkpoint(latest(f / "checkpoints")) for f in (folder, tmp_path / "whole"))
        assert ours.images_seen == theirs.images_seen == 224
        assert all(torch.equal(t, ours.whole(kind)[n]) for kind in theirs.kinds for n, t in theirs.whole(kind).items())


@pytest.mark.parametrize("at", [64, 224])
def test_a_report_that_cannot_be_written_once_is_there_with_the_next_save_or_at_the_end(
    train, tmp_path, monkeypatch, at
):
    there, refused, report, begin = [], [], Evaluating._report, Checkpointing._begin

    def full(self):
        if self.run.images_seen == at and not refused:
            refused.append(at)
            refuse(self.run.folder / "metrics.json")
        report(self)

    def note(self):
        begin(self)
        there.append((self.run.images_seen, (self.run.folder / "metrics.json").exists()))

    with monkeypatch.context() as patch:
        patch.setattr(Evaluating, "_report", full)
        patch.setattr(Checkpointing, "_begin", note)
        assert train(tmp_path / "run") == 0
    assert [h["images_seen"] for h in left(tmp_path / "run")["history"]] == [64, 128, 192, 224]
    assert dict(there)[96]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def refuse(path: Path) -> None:
    """The next time that the file is written anew there is no room."""
    path.with_name(f".{path.name}.part").symlink_to("/dev/full")


def seen(path: Path) -> list[str]:
    return [row["images_seen"] for row in read_rows(path)]


@pytest.mark.parametrize("at_last", ["the next row", "save", "finalize"])
def test_a_row_that_a_full_disk_refuses_is_written_when_there_is_room(path, at_last):
    log = CsvLogger(path, 0)
    log.log_metrics({"a": 1.0}, 10)
    refuse(path)
    with pytest.raises(OSError, match="No space"):
        log.log_metrics({"b": 2.0}, 20)
    assert seen(path) == ["10"]
    refuse(path)
    log.save()  # there is none yet
    assert seen(path) == ["10"]
    if at_last == "the next row":
        log.log_metrics({"a": 3.0}, 30)
    else:
        log.save() if at_last == "save" else log.finalize("success")
    assert seen(path) == ["10", "20", "30"][: 3 if at_last == "the next row" else 2]
    assert read_rows(path)[1]["b"] == "2.0"


def test_rows_that_can_never_be_written_are_told_again_at_the_end(path, capsys):
    log = CsvLogger(path, 0)
    path.with_name(f".{path.name}.part").mkdir()
    for step in (10, 20):
        with pytest.raises(OSError, match="directory"):
            log.log_metrics({"a": 1.0}, step)
    log.save()
    assert capsys.readouterr().out == ""
    log.finalize("success")
    assert f"WARNING: {path} lacks 2 rows, which could not be written: " in capsys.readouterr().out


def test_a_row_that_was_cut_in_the_file_is_whole_with_the_next(path, tmp_path):
    log = CsvLogger(path, 0)
    log.log_metrics({"a": 1.0}, 10)
    path.rename(tmp_path / "kept")
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space"):
        log.log_metrics({"a": 2.0}, 20)
    path.unlink()
    path.write_text((tmp_path / "kept").read_text() + "20,2")
    log.log_metrics({"a": 3.0}, 30)
    assert [(row["images_seen"], row["a"]) for row in read_rows(path)] == [("10", "1.0"), ("20", "2.0"), ("30", "3.0")]
