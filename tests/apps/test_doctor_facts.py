"""How many bytes a run will take, on a disk and in the memory of its nodes."""

import mmap

import numpy as np
import pytest
from conftest import SMALL

from diffusion_trainer.apps import doctor
from diffusion_trainer.apps.doctor_facts import Run
from diffusion_trainer.callbacks.ema_snapshots import lengths
from diffusion_trainer.streaming.ring import Ring
from diffusion_trainer.training.checkpoints import Checkpoint, latest

DIGITS = ["experiment=digits", *SMALL]


@pytest.fixture(autouse=True)
def _here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def test_bytes_of_checkpoints_are_those_that_the_callbacks_keep():
    config = doctor.check([*DIGITS, "ema=several", "callbacks.checkpoint.keep=3", "num_images=1000"])
    run = Run(config, None, None)
    assert run.checkpoint_bytes == 4 * run.parameters * (3 + len(config["ema"]["profiles"]))
    assert (run.kept_bytes, run.snapshot_bytes) == (4 * run.checkpoint_bytes, 0)
    snapshots = (
        "+callbacks.more={_target_: diffusion_trainer.callbacks.ema_snapshots.EmaSnapshots, every_n_images: 100}"
    )
    run = Run(doctor.check([*DIGITS, "ema=several", "num_images=1000", snapshots]), None, None)
    assert run.snapshot_bytes == 11 * 4 * run.parameters * len(lengths(run.part("ema")))


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_of_the_host_have_the_memory_that_batches_are_made_in(workers, monkeypatch):
    made = []
    monkeypatch.setattr(mmap, "mmap", lambda _, size: made.append(size) or np.empty(size, np.uint8))
    run = Run(doctor.check([*DIGITS, f"data.num_workers={workers}"]), None, None)
    state = 2 * run.checkpoint_bytes + 8 * run.parameters * run.local_size  # of a sharded run on CPUs
    loader = run.loader
    Ring(*loader.slots, loader.kinds, loader.lendable)
    assert run.host_bytes == run.local_size * sum(made[:-1]) + state  # the last one says which slots are in use


@pytest.mark.slow
def test_bytes_of_a_checkpoint_are_those_that_it_has(trained):
    run = Run(doctor.check(DIGITS), None, None)
    checkpoint = Checkpoint(latest(trained / "runs" / "digits" / "checkpoints"))
    whole = sum(t.numel() * t.element_size() for kind in checkpoint.kinds for t in checkpoint.whole(kind).values())
    assert run.checkpoint_bytes == whole
