"""Real runs on real processes: what changes how a step is computed does not change what it computes."""

import pytest
import spied_runs
from conftest import SMALL, command, finish
from forked_runs import train_here

from diffusion_trainer.training.strategies import Zero

SPY = [
    "experiment=digits", "allowed_targets=[spies]", "+callbacks.spy._target_=spies.Spy", "callbacks.evaluate=null",
    "num_images=64", "optimizer.lr=0.01", "optimizer.weight_decay=0.1", "optimizer.lr_schedule.warmup_images=0",
    "optimizer.lr_schedule.final=1.0", "ema.half_life_images=64", "ema.ramp_up_ratio=0.5",
    "trainer.gradient_clip_norm=null",  # the norm of offloaded gradients is summed in another order
    *SMALL,
]  # fmt: skip
slow = pytest.mark.slow


def trained(folder, name, *overrides, started=0):
    """The report of a spied run of four steps in <folder>/runs/<name>."""
    return spied_runs.report_of(train_here(folder, *SPY, f"name={name}", *overrides), started)


@pytest.fixture(scope="module")
def plain(folder):
    """plain(strategy): a run without options, once; or with dropout."""
    reports = {}

    def report(strategy, dropout=0.0):
        if (strategy, dropout) not in reports:
            name, options = f"plain-{len(reports)}", [f"strategy={strategy}", f"network.dropout={dropout}"]
            reports[strategy, dropout] = trained(folder, name, *options)
        return reports[strategy, dropout]

    return report


def bitwise(a, b):
    """Losses, weights, EMA and both moments."""
    return a["losses"] == b["losses"] and spied_runs.bitwise(a, b)


@slow
@pytest.mark.parametrize("strategy", ["single", "zero2", "zero3"])
def test_checkpointed_blocks_change_no_bit_of_a_run_with_dropout(folder, plain, strategy):
    options = [f"strategy={strategy}", "network.dropout=0.2", "network.checkpoint_blocks=true"]
    assert bitwise(trained(folder, f"blocks-{strategy}", *options), plain(strategy, 0.2))


@slow
@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_takes_the_same_steps_to_the_last_bit(folder, plain, stage):
    """Swaps for evaluation and the closed form of the EMA included, which the spy checks."""
    options = [f"strategy=zero{stage}_offload", "+callbacks.spy.swap_every=2"]
    report = trained(folder, f"offload-{stage}", *options)
    assert report["ema_error"] < 1e-6
    assert bitwise(report, plain(f"zero{stage}"))


@slow
@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_run_is_resumed_bitwise(folder, plain, stage):
    options = [f"strategy=zero{stage}_offload"]
    trained(folder, f"half-{stage}", *options, "num_images=32")
    report = trained(folder, f"half-{stage}", *options, started=32)
    whole = plain(f"zero{stage}")
    assert bitwise(report, {**whole, "losses": whole["losses"][2:]})


@slow
@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_run_accumulates_and_clips_alike(folder, stage):
    options = ["trainer.gradient_clip_norm=0.2", "trainer.accumulate_grad_batches=2"]
    with_it = trained(folder, f"pieces-{stage}-offload", f"strategy=zero{stage}_offload", *options)
    without = trained(folder, f"pieces-{stage}", f"strategy=zero{stage}", *options)
    assert with_it["losses"] == pytest.approx(without["losses"], rel=1e-5)
    assert max(float((with_it["weights"][n] - w).abs().max()) for n, w in without["weights"].items()) < 1e-3
    assert with_it["ema_error"] < 1e-6


COMPILED = ["network.channel_multipliers=[1]", "network.attention_levels=[]", "+callbacks.spy.swap_every=2"]


@slow
@pytest.mark.parametrize("strategy", ["zero2"])  # each compiles for minutes
def test_a_compiled_network_trains_like_the_eager_one_and_leaves_the_same_checkpoint(folder, strategy):
    """Swaps for evaluation included; samples are drawn by a network that is not compiled."""
    options = [f"strategy={strategy}", *COMPILED, "num_images=32"]
    report = trained(folder, f"compiled-{strategy}", *options, "compile=true")
    whole = trained(folder, f"eager-{strategy}", *options)
    assert report["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert report["weights"].keys() == whole["weights"].keys()
    assert max(float((report["weights"][n] - w).abs().max()) for n, w in whole["weights"].items()) < 1e-3
    checkpoint = f"checkpoint=runs/compiled-{strategy}"
    code, output = finish(command("sample", checkpoint, "n=2", "sampler.num_steps=2", cwd=folder))
    assert code == 0, output


def test_only_a_stage_that_shards_gradients_offloads():
    with pytest.raises(ValueError, match="stage 2 or 3, not 1"):
        Zero(1, offload_optimizer=True)
