"""Real runs on real processes: every strategy computes the same numbers, and its averages are the closed form."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import command, finish
from spied_runs import SPY, bitwise, largest, report_of, spied, spied_once

from diffusion_trainer.training import strategies

pytestmark = pytest.mark.slow


CONSTANT = "optimizer.lr_schedule.final=1.0"  # the cosine of a shorter run would be another


@pytest.fixture
def single(folder):
    return spied_once(folder, "single", "strategy=single")


def swapped(folder, strategy):
    """The run of two processes whose averages take the weights' place now and then."""
    return spied_once(folder, strategy, f"strategy={strategy}", "+callbacks.spy.swap_every=3")


def test_one_process_has_the_closed_form_and_every_sample_of_its_batches(single):
    assert single["ema_error"] < 1e-6
    assert [number for number, _ in single["ledger"]] == list(range(128))


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_two_processes_compute_what_one_does(folder, single, strategy):
    """Same samples, same losses, same weights; EMA equal to its closed form; a swap for evaluation changes nothing."""
    two = swapped(folder, strategy)
    assert two["ema_error"] < 1e-6
    assert two["ledger"] == single["ledger"]
    assert two["losses"] == pytest.approx(single["losses"], rel=1e-5)
    # Adam divides by the root of the moments: where a gradient is rounding, summation order decides a step's sign.
    assert largest(two, single, "weights") < 1e-3
    assert largest(two, single, "ema") < 1e-3


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_accumulation_and_clipping_change_nothing_but_the_order_of_sums(folder, single, strategy):
    """(Lightning and DeepSpeed both divide the loss by the micro-batches; with clipping that shows.)"""
    clipped = "trainer.gradient_clip_norm=0.2"
    whole = spied_once(folder, "clipped", "strategy=single", clipped)
    pieces = spied(folder, f"pieces-{strategy}", f"strategy={strategy}", clipped, "trainer.accumulate_grad_batches=2")
    assert pieces["ledger"] == whole["ledger"]
    assert pieces["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert whole["losses"] != pytest.approx(single["losses"], rel=1e-5)  # the clipping does something
    assert largest(pieces, whole, "weights") < 1e-3
    assert pieces["ema_error"] < 1e-6


@pytest.mark.parametrize("strategy", ["single", "zero2", "zero3"])
def test_resumed_is_uninterrupted_bitwise(folder, strategy):
    """Stopped after half of the images and started again: weights, EMA and moments to the last bit."""
    name, options = f"resumed-{strategy}", [f"strategy={strategy}", CONSTANT]
    options += ["network.dropout=0.2"] if strategy == "zero2" else []
    spied(folder, name, *options, "num_images=64")
    again = spied(folder, name, *options, started=64)
    whole = spied_once(folder, f"whole-{strategy}", *options)
    assert [n for n, _ in again["ledger"]] == list(range(64, 128))
    assert again["ledger"] == whole["ledger"][64:]
    assert again["losses"] == whole["losses"][4:]
    assert bitwise(again, whole)


def test_another_strategy_and_world_resume_a_checkpoint(folder):
    """ZeRO-3 on two processes, then ZeRO-2 on two, then one process: the trajectory goes on."""
    spied(folder, "moved", "strategy=zero3", "num_images=48", CONSTANT)
    spied(folder, "moved", "strategy=zero2", "num_images=96", CONSTANT, started=48)
    last = spied(folder, "moved", "strategy=single", CONSTANT, started=96)
    whole = spied_once(folder, "whole-single", "strategy=single", CONSTANT)
    assert last["losses"] == pytest.approx(whole["losses"][6:], rel=1e-5)
    assert last["ledger"] == whole["ledger"][96:]
    paths = (folder / "runs" / "moved" / "checkpoints").glob("images-*/manifest.json")
    said = {m["images_seen"]: m["written_by"] for m in map(json.loads, map(Path.read_text, paths))}
    written = {n: (by["strategy"].split(",")[0], by["ranks"]) for n, by in said.items()}
    assert written == {48: ("Zero(stage=3", 2), 96: ("Zero(stage=2", 2), 128: ("Single()", 1)}
    assert largest(last, whole, "ema") < 1e-3


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_evaluation_while_training_changes_no_bit_of_it(folder, strategy):
    without = swapped(folder, strategy)
    overrides = [o for o in SPY if o != "callbacks.evaluate=null"] + ["callbacks.evaluate.every_n_images=32"]
    name = f"evaluated-{strategy}"
    code, output = finish(command("train", *overrides, f"name={name}", f"strategy={strategy}", cwd=folder))
    assert code == 0, output
    assert output.count("evaluation at") == 5
    assert bitwise(report_of(folder / "runs" / name), without)


LEARNING = {
    "schedule": ["schedule=learned", "weighting=elbo_continuous"],
    "uncertainty": ["objective=uncertainty"],
    "times": ["timesteps=loss_second_moment", "timesteps.bins=4", "timesteps.history=2"],
}


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("what", LEARNING)
def test_what_an_objective_learns_does_not_depend_on_the_strategy(folder, what, strategy):
    """A learned schedule, a learned uncertainty, and times that follow the losses of all ranks."""
    one = spied_once(folder, what, "strategy=single", *LEARNING[what])
    two = spied(folder, f"{what}-{strategy}", f"strategy={strategy}", *LEARNING[what])
    assert any(parameter.startswith("learned.") for parameter in two["weights"]) == (what != "times")
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert largest(two, one, "weights") < 1e-3


@pytest.mark.parametrize("what", LEARNING)
def test_what_an_objective_has_learned_is_resumed_bitwise(folder, what):
    options = ["strategy=zero2", CONSTANT, *LEARNING[what]]
    whole = spied(folder, f"{what}-constant", *options)
    spied(folder, f"{what}-stopped", *options, "num_images=64")
    resumed = spied(folder, f"{what}-stopped", *options, started=64)
    assert bitwise(resumed, whole)
    assert resumed["losses"] == whole["losses"][4:]


class NoDeepSpeed:
    """As an optimizer of DeepSpeed, with other internals."""

    allreduce_and_copy = 3


@pytest.mark.parametrize("name", ["allreduce_and_copy", "_prepare_fp32_grad_for_sub_group"])
def test_another_deepspeed_is_an_error_that_names_what_it_lacks(name):
    with pytest.raises(RuntimeError, match=f"no NoDeepSpeed.{name}; the one in constraints.txt has"):
        strategies._override(NoDeepSpeed(), **{name: lambda zero: None})


def stage_3(*parts):
    """What _partition_of_stage_3 needs of DeepSpeed's optimizer."""
    master = torch.zeros(sum(part.numel() for part in parts), requires_grad=True)
    return SimpleNamespace(averaged_gradients=[list(parts)], fp32_partitioned_groups_flat=[master])


def test_gradients_of_a_partition_in_a_row_become_the_masters_without_a_copy():
    buffer = torch.arange(12.0)
    zero = stage_3(*buffer[2:9].split([3, 4]))
    strategies._partition_of_stage_3(zero, 0)
    (master,) = zero.fp32_partitioned_groups_flat
    assert torch.equal(master.grad, buffer[2:9])
    assert master.grad.data_ptr() == buffer[2:].data_ptr()


@pytest.mark.parametrize("parts", [(slice(0, 3), slice(4, 9)), (slice(5, 9), slice(0, 5))])
def test_gradients_elsewhere_are_an_error(parts):
    buffer = torch.arange(12.0)
    with pytest.raises(RuntimeError, match="do not lie in a row"):
        strategies._partition_of_stage_3(stage_3(*(buffer[part] for part in parts)), 0)
