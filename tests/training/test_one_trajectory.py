"""Fifty steps have the same loss each, whoever computes them: ranks, stages, micro-batches."""

import pytest
from covering import covering_array
from spied_runs import largest, spied

pytestmark = pytest.mark.slow

RUN = ["num_images=800", "optimizer.lr=0.001", "lanes=16"]  # 50 steps of 16: on 4 ranks, down to micro-batches of one
FACTORS = {
    "strategy": ("ddp", "zero1", "zero2", "zero3"),
    "trainer.processes": ("1", "2", "4"),
    "trainer.accumulate_grad_batches": ("1", "2", "4"),
}
LAYOUTS = [
    {"strategy": "single", "trainer.accumulate_grad_batches": "4"},
    *covering_array(FACTORS, lambda row: True),
]


@pytest.fixture(scope="module")
def one(folder):
    return spied(folder, "one", "strategy=single", *RUN)


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda row: "-".join(f"{key.split('.')[-1][:9]}={value}" for key, value in row.items())
)
def test_every_layout_follows_the_trajectory_of_one_process(folder, one, layout):
    name = f"layout-{LAYOUTS.index(layout)}"
    found = spied(folder, name, *(f"{key}={value}" for key, value in layout.items()), *RUN)
    assert len(one["losses"]) == 50
    assert found["ledger"] == one["ledger"]
    assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert largest(found, one, "weights") < 1e-3
    assert found["ema_error"] < 1e-6
