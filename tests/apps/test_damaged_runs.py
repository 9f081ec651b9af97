"""Runs on damaged shards: what is broken is replaced, counted and listed; too much of it stops the run, resumable."""

import csv
import shutil

import pytest
from conftest import SMALL, command, finish

from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.slow
RUN = [
    "train", "experiment=digits", *SMALL, "data.shards=mine/train-*.tar", "callbacks.evaluate=null",
    "callbacks.checkpoint.every_n_images=100000", "strategy=ddp",
]  # fmt: skip


@pytest.fixture
def shards(workplace):
    shutil.copytree(workplace / "shards" / "digits", workplace / "mine")
    return workplace / "mine"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_flipped_bit_is_replaced_counted_and_listed(workplace, shards):
    arguments = [*RUN, "logger=default", "num_images=1504"]
    flip(shards / "train-000002.tar", 5000)
    code, output = finish(command(*arguments, cwd=workplace))
    assert code == 0, output
    assert "1 damaged samples were replaced (1 checksum)" in output
    run = workplace / "runs" / "digits"
    (row,) = rows(run / "damage.csv")
    assert (row["kind"], row["shard"]) == ("checksum", "mine/train-000002.tar")
    assert "1" in [r["data/damaged"] for r in rows(run / "metrics.csv")]
    record = next((run / "wandb").glob("offline-run-*/run-*.wandb")).read_bytes()
    assert b"data/damaged_checksum" in record


def test_a_cut_shard_stops_the_run_with_a_list_and_mended_it_goes_on(workplace, shards):
    shard = shards / "train-000004.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    code, output = finish(command(*RUN, "num_images=1504", cwd=workplace))
    assert code == 2, output
    assert "Traceback" not in output
    assert output.count("data.damage_budget=0.001 allows fewer") == 1
    assert "samples are damaged, data.damage_budget=0.001 allows fewer" in output
    assert "truncated      mine/train-000004.tar" in output
    run = workplace / "runs" / "digits"
    assert Checkpoint(latest(run / "checkpoints")).images_seen == 1504
    listed = rows(run / "damage.csv")
    assert {(row["kind"], row["shard"]) for row in listed} == {("truncated", "mine/train-000004.tar")}
    assert 120 <= len({row["sample"] for row in listed}) <= 130  # half of its 250

    shard.write_bytes(whole)
    code, output = finish(command(*RUN, "num_images=1600", cwd=workplace))
    assert code == 0, output
    assert "resuming from images-000000001504" in output


def test_another_index_is_refused_when_a_run_goes_on(workplace, shards):
    code, output = finish(command(*RUN, "num_images=160", cwd=workplace))
    assert code == 0, output
    (shards / "train-000005.tar").unlink()
    code, output = finish(command(*RUN, "num_images=320", "data.damage_budget=0.5", cwd=workplace))
    assert code == 0, output  # the index names it still: a shard is missing
    code, output = finish(command("index", "mine", "again=true", cwd=workplace))
    assert code == 0, output
    code, output = finish(command(*RUN, "num_images=480", cwd=workplace))
    assert code == 2, output
    assert "has been training on shards with another index" in output
