"""Damaged samples are listed, whatever ends the run."""

import csv
from types import SimpleNamespace

import pytest
import tiny
from torch.utils.data import DataLoader

from diffusion_trainer.apps import rank
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks.damage import LIST, CountDamage
from diffusion_trainer.conventions import PassingError
from diffusion_trainer.streaming.damage import Found

FOUND = [Found("checksum", "x.tar", i, "its bytes are not those that were indexed") for i in range(3)]


@pytest.fixture
def callback(tmp_path, request) -> CountDamage:
    """Of the first of two ranks, or of the second one, early in a run."""
    made = CountDamage(budget=0.5, count=None)
    made.logged = []
    first = getattr(request, "param", True)
    made.run = SimpleNamespace(
        folder=tmp_path, images_seen=32, state={}, first=first, log=made.logged.append, say=print
    )
    made.start()
    return made


@pytest.mark.parametrize("callback", [True, False], indirect=True)
def test_what_a_rank_has_found_is_in_the_file_before_an_error_of_its_data_stops_the_run(callback, tmp_path):
    """Of the other ranks it must not ask anything (there is no `agreement` here): they wait in another place."""
    callback._new = [(32, FOUND[0])]
    callback.on_train_batch_start(None, None, {"error": "64 samples in a row are damaged", "damage": FOUND[1:]}, 7)
    with (tmp_path / LIST).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["images_seen"], row["kind"], row["shard"], row["sample"]) for row in rows] == [
        ("32", "checksum", "x.tar", str(i)) for i in range(3)
    ]
    assert callback.logged == [{"data/damaged": 3, "data/damaged_checksum": 3}]


def test_the_list_has_no_secrets(callback, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "canary-of-a-token")
    callback._write([(32, Found("missing", "https://host/canary-of-a-token/x.tar", 0, "canary-of-a-token"))])
    assert "32,missing,https://host/***/x.tar,0,***" in (tmp_path / LIST).read_text()


@pytest.mark.filterwarnings("ignore")
def test_callbacks_see_what_stops_the_run_before_it_ends(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(CountDamage, "on_train_batch_start", lambda *arguments: seen.append(arguments[3]))
    bad = {"error": "the store does not answer", "passing": True, "damage": [], "first": 0}
    monkeypatch.setattr(
        "diffusion_trainer.streaming.data.ShardData.loader", lambda *_: DataLoader([bad], batch_size=None)
    )
    overrides = [
        *tiny.overrides(tmp_path), *tiny.NETWORK, "network.attention_levels=[]", "strategy=single",
        "trainer.accelerator=cpu", f"folder='{tmp_path}/run'", "num_images=64", "callbacks.evaluate=null",
    ]  # fmt: skip
    config = load("train", overrides, TrainConfig)
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", config)
    with pytest.raises(PassingError, match="the store does not answer"):
        rank.work(config, tmp_path / "run", World(0, 1, 1, False))
    assert seen == [bad]


def test_a_good_batch_and_an_error_without_damage_write_nothing(callback, tmp_path):
    callback.on_train_batch_start(None, None, {"image": None, "damage": []}, 0)
    callback.on_train_batch_start(None, None, {"error": "a worker was killed"}, 0)
    assert not list(tmp_path.iterdir())
    assert not callback.logged
