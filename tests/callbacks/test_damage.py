"""Damaged samples are listed, whatever ends the run."""

import csv
import resource
from contextlib import contextmanager
from pathlib import Path
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
from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.damage import Found
from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.slow

FOUND = [Found("checksum", "x.tar", i, "its bytes are not those that were indexed") for i in range(3)]


def begun(folder: Path, first: bool = True, state: dict | None = None) -> CountDamage:
    """Of one of two ranks, early in a run, or going on from a state."""
    made = CountDamage(budget=0.5, count=None)
    made.logged, made.alerts, made.said = [], [], []

    @contextmanager
    def going_on(what: str):
        try:
            yield
        except OSError:
            made.alerts.append(what)

    made.run = SimpleNamespace(
        folder=folder, images_seen=32, state=state or {}, first=first, log=made.logged.append, say=made.said.append,
        going_on=going_on, module=SimpleNamespace(progress=SimpleNamespace(batch_size=16)),
    )  # fmt: skip
    made.start()
    return made


@pytest.fixture
def callback(tmp_path, request) -> CountDamage:
    return begun(tmp_path, getattr(request, "param", True))


def listed(folder: Path) -> list[tuple[str, ...]]:
    with (folder / LIST).open(newline="") as file:
        return [(row["images_seen"], row["kind"], row["shard"], row["sample"]) for row in csv.DictReader(file)]


@contextmanager
def full_after(path: Path, more: int):
    """Files may become so much larger than this one is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("callback", [True, False], indirect=True)
def test_what_a_rank_has_found_is_in_the_file_before_an_error_of_its_data_stops_the_run(callback, tmp_path):
    """Of the other ranks it must not ask anything (there is no `agreement` here): they wait in another place."""
    callback._unlisted = [(16, FOUND[0])]
    callback._new = [(32, FOUND[0])]
    callback.on_train_batch_start(None, None, {"error": "64 samples in a row are damaged", "damage": FOUND[1:]}, 7)
    rows = (("16", 0), ("32", 0), ("48", 1), ("48", 2))  # the step that is not taken would come to 48
    assert listed(tmp_path) == [(at, "checksum", "x.tar", str(i)) for at, i in rows]
    assert callback.said


def test_a_full_disk_does_not_hide_the_error_of_the_data(callback, tmp_path):
    callback._write([(16, FOUND[0])])
    with full_after(tmp_path / LIST, 10):
        callback.on_train_batch_start(None, None, {"error": "64 samples in a row are damaged", "damage": FOUND[1:]}, 7)
    assert callback.alerts == [LIST]
    assert listed(tmp_path) == [("16", "checksum", "x.tar", "0")]


def test_what_a_full_disk_kept_back_is_counted_and_listed_once_by_the_run_that_goes_on(tmp_path):
    callback, other = begun(tmp_path), begun(tmp_path, first=False)
    for made in (callback, other):
        made.run.agreement = SimpleNamespace(gather=lambda own: [own])
    callback._write([(16, FOUND[0])])
    with full_after(tmp_path / LIST, 40):  # in the middle of the first row
        for made in (callback, other):
            made._new = [(32, found) for found in FOUND[1:]]
            made._weigh()
    assert (callback.alerts, other.alerts, other._unlisted) == ([LIST], [], [])
    assert listed(tmp_path) == [("16", "checksum", "x.tar", "0")]
    callback.before_save()
    after = begun(tmp_path, state=callback.run.state)
    after.run.agreement = callback.run.agreement
    after._weigh()
    assert listed(tmp_path) == [(at, "checksum", "x.tar", str(i)) for at, i in (("16", 0), ("32", 1), ("32", 2))]
    assert (after._before, after._counts, after._unlisted) == ({"checksum": 2}, {}, [])


def test_the_list_has_no_secrets(callback, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "canary-of-a-token")
    callback._write([(32, Found("missing", "https://host/canary-of-a-token/x.tar", 0, "canary-of-a-token"))])
    assert "32,missing,https://host/***/x.tar,0,***" in (tmp_path / LIST).read_text()


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_goes_on_on_a_full_disk_and_its_list_is_what_it_would_be(tmp_path, lost):
    """lost: the list has damage of steps that the run is yet to take again."""
    begun(tmp_path)._write([(32, FOUND[0]), *([(64, FOUND[1])] if lost else [])])
    part = tmp_path / f".{LIST}.part"
    part.symlink_to("/dev/full")
    callback = begun(tmp_path)
    assert callback.alerts == ([LIST] if lost else [])
    part.unlink(missing_ok=True)
    callback._write([(64, FOUND[2])])
    assert listed(tmp_path) == [("32", "checksum", "x.tar", "0"), ("64", "checksum", "x.tar", "2")]


@pytest.fixture
def run(tmp_path):
    """Trains in this process on 100 images in two shards, so many altogether."""

    def go(num_images: int) -> int:
        overrides = [
            *setting, *tiny.NETWORK, "network.attention_levels=[]", "strategy=single", "trainer.accelerator=cpu",
            f"folder='{tmp_path}/run'", f"num_images={num_images}", "callbacks.evaluate=null", "batch_size=1000",
            "callbacks.checkpoint.every_n_images=1000000",
        ]  # fmt: skip
        config = load("train", overrides, TrainConfig)
        (tmp_path / "run").mkdir(exist_ok=True)
        write_config(tmp_path / "run", config)
        return rank.work(config, tmp_path / "run", World(0, 1, 1, False))

    setting = tiny.overrides(tmp_path)
    return go


@pytest.mark.filterwarnings("ignore")
def test_too_much_damage_stops_a_run_at_the_next_mark_and_mended_it_goes_on(tmp_path, run):
    """Not at its end: the mark is at 10,000 of 11,000 images. One in a hundred is broken, one in a thousand allowed."""
    shard, saved = tmp_path / "tiny" / "train-000001.tar", lambda: Checkpoint(latest(tmp_path / "run" / "checkpoints"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    with pytest.raises(UserError, match=r"(?s)^100 of 10,000 samples are damaged, .*     100 checksum .*train-000001"):
        run(11_000)
    assert saved().images_seen == 10_000
    with (tmp_path / "run" / LIST).open(newline="") as file:
        rows = [(row["kind"], Path(row["shard"]).name, row["sample"]) for row in csv.DictReader(file)]
    assert rows == [("checksum", shard.name, "0")] * 100
    shard.write_bytes(whole)
    assert run(11_000) == 0
    assert saved().images_seen == 11_000


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
