"""Gradients that are not finite in real runs: those steps are taken by no rank, and a row of them leads back."""

import csv
import json

import pytest
import torch
from conftest import command, finish
from spied_runs import SPY, largest, spied

pytestmark = pytest.mark.slow

GUARDED = ["+callbacks.poison._target_=spies.Poison", "callbacks.log.every_n_images=16"]


def rows(folder, name):
    with (folder / "runs" / name / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def poisoned(first, last):
    return [*GUARDED, f"+callbacks.poison.first={first}", f"+callbacks.poison.last={last}"]


def test_steps_that_one_rank_spoils_are_taken_by_none(folder):
    """Two of eight, under every strategy: the same weights and averages as on one process, all finite."""
    overrides = poisoned(48, 80)
    one = spied(folder, "spoiled-single", "strategy=single", *overrides)
    clean = spied(folder, "clean-single", "strategy=single")
    assert largest(one, clean, "weights") > 1e-3
    assert all(w.isfinite().all() for kind in ("weights", "ema", "moments") for w in one[kind].values())
    for strategy in ("ddp", "zero3"):
        two = spied(folder, f"spoiled-{strategy}", f"strategy={strategy}", *overrides)
        assert largest(two, one, "weights") < 1e-3
        assert largest(two, one, "ema") < 1e-3
        skipped = [r["train/skipped_steps"] for r in rows(folder, f"spoiled-{strategy}") if r["train/skipped_steps"]]
        assert skipped == ["1", "2"]


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
