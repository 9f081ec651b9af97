"""Real ranks find a damaged checkpoint, agree, and go on together from the one before, on groups of their own."""

import pytest
import torch
from conftest import SMALL, command, finish

from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.slow
RUN = [
    "train", "experiment=digits", *SMALL, "callbacks.evaluate=null", "callbacks.checkpoint.every_n_images=32",
    "callbacks.checkpoint.keep=9",
]  # fmt: skip


def tensors(run):
    found = Checkpoint(latest(run / "checkpoints"))
    return {f"{kind}/{n}": t for kind in found.kinds for n, t in found.whole(kind).items()}


@pytest.mark.parametrize(("damaged", "after"), [(1, "zero2"), (0, "zero3"), (1, "single")])
def test_ranks_go_on_together_from_the_one_before(workplace, damaged, after):
    code, output = finish(command(*RUN, "strategy=zero2", "num_images=96", cwd=workplace))
    assert code == 0, output
    run = workplace / "runs" / "digits"
    path = run / "checkpoints" / "images-000000000096" / f"rank-{damaged:05d}.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    code, output = finish(command(*RUN, f"strategy={after}", "num_images=160", cwd=workplace))
    assert code == 0, output
    assert output.count("is damaged: its checksum is not the manifest's") == 1
    assert f"{path.parent.name}/{path.name} is damaged" in output
    assert "going on from images-000000000064, the one before" in output
    code, output = finish(command(*RUN, "strategy=zero2", "num_images=160", "name=whole", cwd=workplace))
    assert code == 0, output
    ours, theirs = tensors(run), tensors(workplace / "runs" / "whole")
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert (
            torch.equal(ours[key], theirs[key])
            if after == "zero2"
            else torch.allclose(ours[key], theirs[key], atol=1e-4)
        )
