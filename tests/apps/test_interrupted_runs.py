"""Whatever the strategy, a run that is interrupted within a step, in an evaluation, and as an epoch ends is the run
that was left alone: bitwise, in fp32, on the same ranks.

A pairwise covering: each strategy x place, place x way to be interrupted, strategy x way (with offload, one place
each). A disturbed run has its interruptions one after the other; in the step of the first an epoch ends, too.
"""

import signal

import pytest
import tiny
from conftest import SMALL
from forked_runs import run_ranks
from ledgers import lines
from undisturbed import check_same_end, numbers, table

from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.streaming.writer import write_shards
from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.slow

PLACES = (  # (where, after so many images, what a kill leaves to go on from)
    ("mid_accumulation", 48, 32),
    ("ask", 112, 96),
    ("mid_evaluation", 128, 128),
)
STRATEGIES = {
    "single": PLACES, "ddp": PLACES, "zero1": PLACES, "zero2": PLACES, "zero3": PLACES,
    "zero2_offload": PLACES[:1], "zero3_offload": PLACES[2:],
}  # fmt: skip
EPOCH, STEP, IMAGES = 56, 16, 192
ITS_OWN = ("run_id", "save_seconds")  # of a checkpoint's state
RUN = [
    "experiment=digits", "trainer.accelerator=cpu", *SMALL, "network.channel_multipliers=[1]",
    "network.attention_levels=[]", "network.dropout=0.2", "timesteps=loss_second_moment", "timesteps.bins=4",
    "timesteps.history=2", f"num_images={IMAGES}", "trainer.accumulate_grad_batches=2", "ema=several",
    "optimizer.lr=0.01", "optimizer.lr_schedule.warmup_images=32", "data.shards=shards/tiny/train-*.tar",
    "evaluation.reference.shards=[shards/tiny/train-*.tar]", "evaluation.batch_size=10",
    "callbacks.checkpoint.every_n_images=32", "callbacks.log.every_n_images=48", "callbacks.evaluate.every_n_images=64",
    "allowed_targets=[spies,interrupts]", "+callbacks.ledger._target_=spies.Ledger",
    "+callbacks.interrupt._target_=interrupts.Interrupt",
]  # fmt: skip


@pytest.fixture
def start(folder, monkeypatch):
    """start(name, strategy, *interruption) -> the exit codes of its ranks."""
    monkeypatch.chdir(folder)
    if not (folder / "shards" / "tiny").exists():
        write_shards(tiny.samples(EPOCH), folder / "shards" / "tiny", "train", 30)

    def start(name: str, strategy: str, *interruption) -> list[int]:
        run = folder / "runs" / name
        run.mkdir(parents=True, exist_ok=True)
        write_config(run, load("train", [*RUN, f"strategy={strategy}", f"name={name}"], TrainConfig))
        plan = " ".join(map(str, interruption or ("nowhere", 0, 0, 0)))
        return run_ranks(run, 1 if strategy == "single" else 2, INTERRUPT=plan)

    return start


def way(strategy: str, place: tuple) -> signal.Signals:
    return (signal.SIGTERM, signal.SIGKILL)[([*STRATEGIES].index(strategy) + PLACES.index(place)) % 2]


def state(run) -> dict:
    """What a checkpoint has beside its tensors."""
    return {k: v for k, v in Checkpoint(latest(run / "checkpoints")).manifest["state"].items() if k not in ITS_OWN}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_interrupted_within_a_step_in_an_evaluation_and_as_an_epoch_ends_it_is_the_run_left_alone(
    folder, start, strategy
):
    alone, run = (folder / "runs" / f"{strategy}-{name}" for name in ("alone", "disturbed"))
    assert not any(start(alone.name, strategy))
    lost = set()
    for interruption in STRATEGIES[strategy]:
        (place, images, saved), how = interruption, way(strategy, interruption)
        killed = how == signal.SIGKILL
        *others, last = start(run.name, strategy, place, images, int(how), saved)
        assert last == (-how if killed else 128 + how)  # and the others have lost their peer, or stop with it
        assert others == ([] if strategy == "single" else [1 if killed else 128 + how])
        done = images + STEP * (place == "mid_accumulation")  # a stop takes the step to its end
        assert Checkpoint(latest(run / "checkpoints")).images_seen == (saved if killed else done)
        lost |= set(range(saved, done)) if killed else set()
    assert not any(start(run.name, strategy))
    check_same_end(run, alone)
    assert state(run) == state(alone)
    rows = table(run)
    assert numbers(rows) == numbers(table(alone))
    assert [row["images_seen"] for row in rows if row["eval/fid"]] == ["0", "64", "128", "192"]
    seen = [number for number, _ in lines(run)]
    assert {number for number in seen if seen.count(number) > 1} <= lost
