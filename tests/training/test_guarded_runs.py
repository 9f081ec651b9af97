"""Losses and gradients that are not finite, and a loss that leaps, in real runs: no rank takes such a step, a row of
them leads back, and so does the leap.
"""

import csv
import json

import pytest
import torch
from conftest import command, finish
from spied_runs import SPY, largest, report_of, spied

pytestmark = pytest.mark.slow

GUARDED = [
    "+callbacks.poison._target_=spies.Poison", "callbacks.log.every_n_images=16",
    "+logger.alerts._target_=spies.Alerts",
]  # fmt: skip
STRATEGIES = ["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


def rows(folder, name):
    with (folder / "runs" / name / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def alerts(folder, name):
    """Titles and texts, in their order."""
    return [json.loads(line) for line in (folder / "runs" / name / "alerts.jsonl").read_text().splitlines()]


def poisoned(first, last):
    return [*GUARDED, f"+callbacks.poison.first={first}", f"+callbacks.poison.last={last}"]


# A gradient of NaN in the step at 48 images, a loss of infinity whose gradient is finite in the step at 80, a gradient
# whose square float32 cannot hold in that at 112.
SPOILED = [
    *poisoned(48, 64),
    "+callbacks.raise={_target_: spies.Raise, first: 80, last: 96, by: inf}",
    "+callbacks.square={_target_: spies.Poison, first: 112, last: 128, by: 1e25}",
]


@pytest.fixture(scope="module")
def one(folder):
    return spied(folder, "spoiled", "strategy=single", *SPOILED)


def test_a_spoiled_step_is_counted_told_and_as_if_it_had_never_been(folder, one):
    """(That it leaves each bit of weights, averages and moments as it was, the spy checks.)"""
    clean = spied(folder, "clean", "strategy=single")
    assert one["kept"] == [1, 1, 1, 0, 1, 0, 1, 0]
    assert largest(one, clean, "weights") > 1e-3
    assert all(w.isfinite().all() for w in one["all"].values())
    told(folder, "spoiled")


def told(folder, name):
    skipped = [(r["images_seen"], r["train/skipped_steps"]) for r in rows(folder, name) if r["train/skipped_steps"]]
    assert skipped == [("64", "1"), ("96", "2"), ("128", "3")]
    say = "the {} at {} images was not finite: that step was not taken"
    texts = [say.format("gradient", 48), say.format("loss", 80), say.format("gradient", 112)]
    assert alerts(folder, name) == [["step not taken", text] for text in texts]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_that_one_rank_spoils_are_taken_by_none(folder, one, strategy, micro_batches):
    """In the first of its micro-batches; to the last bit, which the spy checks, and then as on one process."""
    name = f"spoiled-{strategy}-{micro_batches}"
    two = spied(folder, name, f"strategy={strategy}", f"trainer.accumulate_grad_batches={micro_batches}", *SPOILED)
    assert two["kept"] == one["kept"]
    assert two["ema_error"] < 1e-6
    assert largest(two, one, "weights") < 1e-3
    assert largest(two, one, "ema") < 1e-3
    told(folder, name)


def test_without_clipping_the_same_steps_are_taken_by_none(folder, one):
    free = [*SPOILED, "trainer.gradient_clip_norm=null"]
    alone = spied(folder, "free", "strategy=single", *free)
    assert alone["kept"] == one["kept"]
    assert largest(alone, one, "weights") > 1e-3  # the others were clipped
    for strategy in ("zero2", "zero3"):
        two = spied(folder, f"free-{strategy}", f"strategy={strategy}", *free)
        assert two["kept"] == one["kept"]
        assert largest(two, alone, "weights") < 1e-3


@pytest.mark.parametrize("strategy", ["single", "zero2"])
def test_a_row_of_them_leads_back_and_on_with_later_data(folder, strategy):
    """Samples 64 to 112 are bad: after two steps the run goes back to 64, and on with 96, in the last bad step."""
    name = f"back-{strategy}"
    overrides = [*SPY, *poisoned(64, 112), f"name={name}", f"strategy={strategy}", "callbacks.guard.skipped_in_a_row=2",
                 "callbacks.checkpoint.every_n_images=32", "+callbacks.ledger._target_=spies.Ledger"]  # fmt: skip
    code, output = finish(command("train", *overrides, cwd=folder))
    assert code == 0, output
    entries = json.loads((folder / "runs" / name / "rollbacks.json").read_text())
    assert [(e["images_seen"], e["left_out"]) for e in entries] == [(64, 32)], entries
    ledger = sorted(
        json.loads(line)[0]
        for path in (folder / "runs" / name).glob("ledger-*.jsonl")
        for line in path.read_text().splitlines()
    )
    assert ledger[-1] == 128 + 32 - 1
    report = torch.load(max((folder / "runs" / name).glob("spy-*.pt")), weights_only=True)
    assert all(w.isfinite().all() for w in report["weights"].values())
    assert output.count("going back to") == len(entries)
    assert [title for title, _ in alerts(folder, name)].count("rollback") == len(entries)


def test_a_loss_that_leaps_leads_back_to_before_the_leap_and_on_after_its_data(folder):
    """One of two ranks has samples 96 to 127 wrong: two steps, most of the last three, as is known at 128 images."""
    leap = "callbacks.poison={_target_: spies.Raise, first: 96, last: 128, by: 1e6}"
    overrides = [
        f"+{leap}", GUARDED[-1], "callbacks.log.every_n_images=16", "callbacks.checkpoint.every_n_images=16",
        "callbacks.guard.recent=3", "callbacks.guard.history=4", "callbacks.guard.spike=1000",
        "callbacks.checkpoint.keep=9", "+callbacks.ledger._target_=spies.Ledger", "num_images=160",
    ]  # fmt: skip
    code, output = finish(command("train", *SPY, "name=leap", "strategy=zero2", *overrides, cwd=folder))
    assert code == 0, output
    run = folder / "runs" / "leap"
    report = report_of(run, started=80)
    (entry,) = json.loads((run / "rollbacks.json").read_text())
    assert (entry["images_seen"], entry["left_out"]) == (80, 48)
    assert [n for n, _ in report["ledger"]] == list(range(128, 208))
    trained = [json.loads(line)[0] for path in run.glob("ledger-*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(trained) == list(range(208))  # each once: those of the steps that were lost are not read again
    ((title, text),) = alerts(folder, "leap")
    assert title == "rollback"
    assert text.startswith("At 128 images the loss was ")
    assert text.endswith("going back to 80, and on with the data after these")
    assert max(report["losses"]) < 10
    assert [r["images_seen"] for r in rows(folder, "leap") if r.get("train/rollbacks")] == ["80"]
