"""Runs whose shards lie on a web server that goes down in the middle of them."""

import os
import time
from collections import Counter
from dataclasses import replace

import pytest
from conftest import SMALL, command, finish
from ledgers import lines, until
from streaming.flaky import serving, status

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.stores import LocalStore
from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.slow
IMAGES = 1440  # of 1,500
STORE = (
    "+data.store={_target_: diffusion_trainer.streaming.cached.CachedStore, cache: cache, cache_bytes: 100000000, "
    "piece_bytes: 4096, retries: 3, backoff_seconds: 0.01, steps_ahead: 1}"
)
RUN = [
    "train", "experiment=digits", *SMALL, STORE, f"num_images={IMAGES}", "callbacks.evaluate=null",
    "callbacks.checkpoint.every_n_images=100000", "allowed_targets=[spies]", "+callbacks.ledger._target_=spies.Ledger",
]  # fmt: skip


def order(run, digits) -> list[str]:
    """The shard and key of each sample, as the files on the disk give them."""
    c = configuration.read(run / "config.yaml")
    data = replace(build(c["data"], "data"), shards=str(digits / "train-*.tar"), store=LocalStore(), num_workers=0)
    batches = data.loader(Layout(c["batch_size"]), c["seed"], c["lanes"], 0, IMAGES // c["batch_size"])
    places = [place for batch in batches for place in batch["samples"].tolist()]
    return [f"{os.path.basename(data.samples.shards[k].url)}:{data.samples.key(k, i)}" for k, i in places]


def test_a_store_that_goes_down_stops_the_run_which_then_goes_on_with_the_very_next_sample(
    digits, workplace, monkeypatch
):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    run = workplace / "runs" / "digits"
    with serving(digits) as server:
        shards = f"data.shards={server.url}/train-*.tar"
        process = command(*RUN, shards, "strategy=ddp", "data.num_workers=1", cwd=workplace)
        until(run, 400, process)
        server.always = {name: status(503) for name in server.files}
        code, output = finish(process)
        assert code == 1, output  # after which a job goes back into the queue
        assert "cannot be had: ClientResponseError: 503" in output
        assert "Traceback" not in output
        stopped = Checkpoint(latest(run / "checkpoints")).images_seen
        assert 384 <= stopped < IMAGES
        assert f"the data go no further than {stopped:,} images: saving these" in output

        server.always.clear()
        code, output = finish(command(*RUN, shards, "strategy=single", "data.num_workers=0", cwd=workplace))
    assert code == 0, output
    assert f"resuming from images-{stopped:012d}" in output
    assert not (run / "damage.csv").exists()
    seen = Counter((number, os.path.basename(key)) for number, key in lines(run))
    assert seen == Counter(enumerate(order(run, digits)))  # no sample is read twice


@pytest.mark.parametrize(("passing", "code"), [("yes", 1), ("", 2)])
def test_all_ranks_save_and_end_in_order_where_one_has_an_error_ahead(workplace, monkeypatch, passing, code):
    """With two micro-batches a step: item 11 is in the midst of the sixth."""
    run = workplace / "runs" / "digits"
    mine = ["allowed_targets=[spies,ill_data]", "data._target_=ill_data.IllData", "trainer.accumulate_grad_batches=2"]
    monkeypatch.setenv("ILL", f"1,11,{passing}")
    train = ["train", "experiment=digits", *SMALL, *RUN[RUN.index(STORE) + 1 :], "strategy=zero2", *mine]
    seen, output = finish(command(*train, cwd=workplace))
    assert seen == code, output
    assert "Traceback" not in output
    assert "error: rank 1 ends with its data: the data of this rank are ill" in output
    assert "error: the data of this rank are ill" in (run / "logs" / "attempt-1" / "rank-1.log").read_text()
    assert Checkpoint(latest(run / "checkpoints")).images_seen == 80
    monkeypatch.delenv("ILL")
    seen, output = finish(command(*train, cwd=workplace))
    assert seen == 0, output
    assert sorted(Counter(number for number, _ in lines(run)).items()) == [(number, 1) for number in range(IMAGES)]


def test_a_run_without_index_stops_likewise(digits, workplace, monkeypatch):
    """data=webdataset, two ranks with a worker each."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    names, checkpoints = (
        sorted(path.name for path in digits.glob("*.tar")),
        workplace / "runs" / "digits" / "checkpoints",
    )
    with serving(digits) as server:
        process = command(
            *RUN[:2], *SMALL, "data=webdataset", f"data.shards=[{','.join(f'{server.url}/{name}' for name in names)}]",
            "data.fields.image.channels=1", "data.fields.image.height=8", "data.fields.image.width=8",
            "data.num_workers=1", "data.retries=3", "data.backoff_seconds=0.01", "num_images=1000000", "strategy=ddp",
            "callbacks.evaluate=null", "callbacks.checkpoint.every_n_images=160", cwd=workplace,
        )  # fmt: skip
        deadline = time.monotonic() + 200
        while latest(checkpoints) is None:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.always = {name: status(503) for name in server.files}
        code, output = finish(process)
    assert code == 1, output
    assert "cannot be had: ClientResponseError: 503" in output
    assert "Traceback" not in output
    assert Checkpoint(latest(checkpoints)).images_seen >= 160
    assert not (workplace / "runs" / "digits" / "damage.csv").exists()
