"""Objectives with a second head for the variance, sharded: one trains all weights, two a head on a frozen trunk."""

import pytest
from spied_runs import bitwise, forget_newest, largest, spied, spied_once

pytestmark = pytest.mark.slow

HALF, WHOLE = 64, 128  # images, of 16 a step
DROPOUT = "network.dropout=0.5"  # a frozen trunk has none, so the losses do not depend on the layout
HEADS = {
    "hybrid": ["objective=hybrid"],
    "npr": ["objective=npr", "init_from=runs/first", DROPOUT],
    "sn": ["objective=sn", "init_from=runs/first", DROPOUT],
}
HEAD = "network.second_head."


@pytest.fixture(scope="module")
def one(folder):
    """one(what): that run of one process."""

    def run(name, *options):
        return spied_once(folder, name, "strategy=single", *options)

    def of(what):
        if "init_from=runs/first" in HEADS[what]:
            run("first", DROPOUT)
        return run(what, *HEADS[what])

    return of


@pytest.mark.parametrize(
    ("what", "strategy"),
    [("hybrid", "zero2"), ("hybrid", "zero3"), ("npr", "zero2"), ("npr", "zero3"), ("sn", "zero2")],
)
def test_a_second_head_is_sharded_averaged_and_resumed_like_all_weights(folder, one, what, strategy):
    """Two processes: losses, samples and weights of one; averages in closed form; resumed bitwise."""
    alone = one(what)
    name, options = f"{what}-{strategy}", [f"strategy={strategy}", *HEADS[what]]
    two = spied(folder, name, *options, f"callbacks.checkpoint.every_n_images={HALF}", "+callbacks.spy.swap_every=3")
    assert two["ledger"] == alone["ledger"]
    assert two["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert two["weights"].keys() == alone["weights"].keys()
    assert {weight.startswith(HEAD) for weight in two["weights"]} == ({True, False} if what == "hybrid" else {True})
    assert largest(two, alone, "weights") < 1e-3
    assert two["ema_error"] < 1e-6
    forget_newest(folder / "runs" / name, WHOLE, HALF)
    again = spied(folder, name, *options, f"callbacks.checkpoint.every_n_images={HALF}", started=HALF)
    assert bitwise(again, two)
    assert again["losses"] == two["losses"][HALF // 16 :]
    assert again["ema_error"] < 1e-6
