"""Real runs on real processes in float16: the same numbers under every strategy, and overflows that all ranks skip."""

import csv
import json

import pytest
import torch
from conftest import command, finish
from spied_runs import SPY, bitwise, largest, spied, spied_once

pytestmark = pytest.mark.slow

CALM = ["optimizer.lr=0.001", "optimizer.lr_schedule.final=1.0"]
HALF = ["precision=fp16", *CALM]
STRATEGIES = ["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


def scaled(at, scale, good_steps=0.0):
    return [
        "allowed_targets=[spies,scaling_spies]", "+callbacks.scales._target_=scaling_spies.Scales",
        f"+callbacks.scales.at={at}", f"+callbacks.scales.scale={scale}", f"+callbacks.scales.good_steps={good_steps}",
        "callbacks.guard.skipped_in_a_row=1", "callbacks.log.every_n_images=16",
    ]  # fmt: skip


def scales(folder, name, rank=0, started=0):
    """Of each step: images before it, kept, scale and good steps after it."""
    return json.loads((folder / "runs" / name / f"scales-{rank}-{started}.json").read_text())


@pytest.fixture
def pieces(folder):
    """One process that computes in the pieces of two."""
    return spied_once(folder, "pieces", "strategy=single", "trainer.accumulate_grad_batches=2", *HALF)


def swapped(folder, strategy):
    """The run of two processes whose averages take the weights' place now and then."""
    return spied_once(folder, strategy, f"strategy={strategy}", "+callbacks.spy.swap_every=3", *HALF)


def overflowing(folder, strategy):
    """The run whose scale is 2^20 from its third step on."""
    return spied_once(folder, f"overflow-{strategy}", f"strategy={strategy}", *HALF, *scaled(32, 2.0**20))


def test_losses_are_those_of_fp32_to_float16s_rounding(folder, pieces):
    exact = spied(folder, "exact", "strategy=single", "precision=fp32", *CALM)
    whole = spied(folder, "whole", "strategy=single", *HALF)
    assert pieces["losses"] == pytest.approx(exact["losses"], rel=1e-3)
    assert whole["losses"] == pytest.approx(exact["losses"], rel=1e-3)
    assert pieces["losses"] != pytest.approx(exact["losses"], rel=1e-6)  # it is float16
    assert pieces["ema_error"] < 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_computes_what_one_process_does(folder, pieces, strategy):
    """The EMA has its closed form, and a swap for evaluation changes nothing."""
    two = swapped(folder, strategy)
    assert two["ledger"] == pieces["ledger"]
    assert two["losses"] == pytest.approx(pieces["losses"], rel=1e-5)
    assert two["ema_error"] < 1e-6
    assert largest(two, pieces, "weights") < 1e-3


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero2", "zero3", "zero3_offload"])
def test_an_overflow_is_skipped_by_all_ranks_and_halves_the_scale(folder, strategy):
    """From 2^20 on down until nothing overflows; what a skipped step must not touch is held by the spy. The guard
    counts these steps, and does not go back for them.
    """
    name, report = f"overflow-{strategy}", overflowing(folder, strategy)
    seen = scales(folder, name)
    kept = [step[1] for step in seen]
    falls = kept.count(0.0)
    assert falls >= 2
    assert kept == [1.0, 1.0, *[0.0] * falls, *[1.0] * (6 - falls)]
    assert falls < 6
    assert [step[2] for step in seen[2:]] == [2.0 ** (20 - min(i + 1, falls)) for i in range(6)]
    assert [step[3] for step in seen] == [1.0, 2.0, *[0.0] * falls, *map(float, range(1, 7 - falls))]
    if strategy != "single":
        assert scales(folder, name, rank=1) == seen
    assert all(w.isfinite().all() for kind in ("weights", "ema", "moments") for w in report[kind].values())
    with (folder / "runs" / name / "metrics.csv").open() as file:
        skipped = [row["train/skipped_steps"] for row in csv.DictReader(file) if row.get("train/skipped_steps")]
    assert skipped == [str(n + 1) for n in range(falls)]
    assert not (folder / "runs" / name / "rollbacks.json").exists()


@pytest.mark.parametrize("strategy", ["single", "zero2", "zero3"])
def test_resumed_is_uninterrupted_bitwise_with_its_scale(folder, strategy):
    """Stopped on the way down from 2^20."""
    overrides = [f"strategy={strategy}", *HALF, *scaled(32, 2.0**20)]
    whole = overflowing(folder, strategy)
    name = f"stopped-{strategy}"
    spied(folder, name, *overrides, "num_images=64")
    (manifest,) = (folder / "runs" / name / "checkpoints").glob("*/manifest.json")
    stopped = scales(folder, f"overflow-{strategy}")[3]
    assert json.loads(manifest.read_text())["state"]["loss_scale"] == {"scale": stopped[2], "good_steps": stopped[3]}
    again = spied(folder, name, *overrides, started=64)
    assert again["losses"] == whole["losses"][4:]
    assert bitwise(again, whole)
    assert scales(folder, name, started=64) == scales(folder, f"overflow-{strategy}")[4:]


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero2", "zero3"])
def test_clipping_and_accumulation_act_on_true_gradients(folder, strategy):
    """Adam hides a factor of all gradients in its weights, not in its moments."""
    clipped = ["trainer.gradient_clip_norm=0.2", "trainer.accumulate_grad_batches=2"]
    exact = spied_once(folder, "clipped-exact", "strategy=single", "precision=fp32", *CALM, *clipped)
    half = spied(folder, f"clipped-{strategy}", f"strategy={strategy}", *HALF, *clipped)
    assert half["losses"] == pytest.approx(exact["losses"], rel=1e-3)
    mine, theirs = (torch.cat([report["moments"][n] for n in sorted(exact["moments"])]) for report in (half, exact))
    assert float((mine - theirs).norm() / theirs.norm()) < 0.02


def test_checkpointed_blocks_change_no_bit(folder):
    whole = swapped(folder, "zero3")
    blocks = spied(folder, "blocks", "strategy=zero3", "network.checkpoint_blocks=true", *HALF)
    assert blocks["losses"] == whole["losses"]
    assert bitwise(blocks, whole)


def test_at_its_least_the_scale_is_not_to_blame(folder):
    """NaN that no scale mends: from 1 on it counts for the guard, which finds nothing to go back to here."""
    poison = ["+callbacks.poison._target_=spies.Poison", "+callbacks.poison.first=32", "+callbacks.poison.last=999"]
    overrides = [*SPY, "name=hopeless", "strategy=single", *HALF, *scaled(32, 2.0), *poison]
    code, output = finish(command("train", *overrides, cwd=folder))
    assert code == 2, output
    assert "1 steps in a row had a loss or a gradient that is not finite" in output
    assert "there is no whole checkpoint from before" in output
    with (folder / "runs" / "hopeless" / "metrics.csv").open() as file:
        skipped = [row["train/skipped_steps"] for row in csv.DictReader(file) if row.get("train/skipped_steps")]
    assert skipped == ["1", "2"]  # from 2 to 1, and the one that counts
