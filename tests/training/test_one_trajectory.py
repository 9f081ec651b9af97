"""Fifty steps have the same loss each, whoever computes them: ranks, stages, micro-batches."""

import pytest
from spied_runs import largest, spied

pytestmark = pytest.mark.slow

RUN = ["num_images=800", "optimizer.lr=0.001"]
LAYOUTS = {
    "ddp on 2": ["strategy=ddp", "trainer.processes=2"],
    "zero1 on 2": ["strategy=zero1", "trainer.processes=2"],
    "zero2 on 2 in micro-batches": ["strategy=zero2", "trainer.processes=2", "trainer.accumulate_grad_batches=2"],
    "zero3 on 4": ["strategy=zero3", "trainer.processes=4"],
    "one in micro-batches": ["strategy=single", "trainer.accumulate_grad_batches=4"],
}


@pytest.fixture(scope="module")
def one(folder):
    return spied(folder, "one", "strategy=single", *RUN)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_follows_the_trajectory_of_one_process(folder, one, layout):
    found = spied(folder, layout.replace(" ", "-"), *LAYOUTS[layout], *RUN)
    assert len(one["losses"]) == 50
    assert found["ledger"] == one["ledger"]
    assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert largest(found, one, "weights") < 1e-3
    assert found["ema_error"] < 1e-6
