"""A run that is killed and goes on, with other ranks and workers, reads the samples of one that never stopped."""

import os
import signal
from collections import Counter

import pytest
from conftest import SMALL, command, finish
from ledgers import lines, tree, until

from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.slow
IMAGES = 3200  # more than two epochs of the 1,500 digits
RUN = [
    "train", "experiment=digits", *SMALL, f"num_images={IMAGES}", "callbacks.evaluate=null",
    "callbacks.checkpoint.every_n_images=320", "allowed_targets=[spies]", "+callbacks.ledger._target_=spies.Ledger",
]  # fmt: skip


def test_killed_and_resumed_on_other_ranks_and_workers_it_reads_every_sample_of_the_order_once(workplace):
    run = workplace / "runs" / "digits"
    code, output = finish(command(*RUN, "strategy=single", "name=whole", cwd=workplace))
    assert code == 0, output
    whole = dict(lines(workplace / "runs" / "whole"))
    assert sorted(whole) == list(range(IMAGES))
    keys = sorted(set(whole.values()))
    assert len(keys) == 1500
    for epoch in (0, 1):
        assert sorted(whole[epoch * 1500 + i] for i in range(1500)) == keys

    # All processes of two ranks with two workers each are killed at once, somewhere after a checkpoint.
    process = command(*RUN, "strategy=ddp", "data.num_workers=2", cwd=workplace)
    until(run, 700, process)
    for pid in tree(process.pid):
        os.kill(pid, signal.SIGKILL)
    finish(process)
    killed = Checkpoint(latest(run / "checkpoints")).images_seen
    assert 320 <= killed < IMAGES

    # One rank without workers is told to stop; then four ranks with one worker each go on to the end.
    process = command(*RUN, "strategy=single", "data.num_workers=0", cwd=workplace)
    until(run, killed + 400, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 128 + signal.SIGTERM, output
    assert f"resuming from images-{killed:012d}" in output
    stopped = Checkpoint(latest(run / "checkpoints")).images_seen
    code, output = finish(command(*RUN, "strategy=zero2", "trainer.processes=4", "data.num_workers=1", cwd=workplace))
    assert code == 0, output
    assert f"resuming from images-{stopped:012d}" in output

    seen = Counter(lines(run))
    assert set(seen) == set(whole.items())
    assert all(number >= killed for (number, _), times in seen.items() if times > 1)  # what was lost with the killed
