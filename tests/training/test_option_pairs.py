"""Each pair of what changes how a step is computed trains, evaluates, saves, and goes on as if it had not stopped."""

import csv

import pytest
from covering import covering_array
from forked_runs import train_here
from spied_runs import SPY, bitwise, forget_newest, report_of

pytestmark = pytest.mark.slow

SWITCHES = {
    "precision": ("fp32", "bf16", "fp16"),
    "trainer.accumulate_grad_batches": ("1", "2"),
    "trainer.gradient_clip_norm": ("null", "0.2"),
    "network.checkpoint_blocks": ("false", "true"),
    "channels_last": ("false", "true"),
    "compile": ("false", "true"),
}
FACTORS = {"strategy": ("single", "ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"), **SWITCHES}
GATHERED = ("zero3", "zero3_offload")  # their weights come and go around each layer: nothing is left to compile
HALF, WHOLE = 32, 64  # images, of 16 a step


def allowed(row):
    return not (row.get("compile") == "true" and row.get("strategy") in GATHERED)


ROWS = covering_array(FACTORS, allowed)
RUN = [
    *(option for option in SPY if option != "callbacks.evaluate=null"),
    "callbacks.evaluate.at_start=false", f"callbacks.evaluate.every_n_images={HALF}",
    f"callbacks.checkpoint.every_n_images={HALF}", "evaluation.num_samples=20", "evaluation.batch_size=10",
    "network.channel_multipliers=[1]", "network.attention_levels=[]", "network.dropout=0.1", "optimizer.lr=0.001",
    f"num_images={WHOLE}",
]  # fmt: skip


def trained(folder, name, *options, started=0):
    """What Spy wrote down."""
    return report_of(train_here(folder, *RUN, f"name={name}", *options), started)


def scored(run):
    """Images seen at each evaluation, in metrics.csv, and what it found."""
    with (run / "metrics.csv").open(newline="") as file:
        return [(row["images_seen"], row["eval/fid"]) for row in csv.DictReader(file) if row.get("eval/fid")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row[factor] for factor in FACTORS))
def test_every_pair_goes_on_bitwise_from_its_own_checkpoint(folder, row):
    name = f"pair-{ROWS.index(row)}"
    options = [f"{key}={value}" for key, value in row.items()]
    whole = trained(folder, name, *options)
    run = folder / "runs" / name
    found = scored(run)
    assert [at for at, _ in found] == [str(HALF), str(WHOLE)]
    forget_newest(run, WHOLE, HALF)
    again = trained(folder, name, *options, started=HALF)
    assert max(whole["ema_error"], again["ema_error"]) < 1e-6
    assert bitwise(again, whole)
    assert again["losses"] == whole["losses"][HALF // 16 :]
    assert scored(run) == found
