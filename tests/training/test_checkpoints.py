"""A checkpoint exists completely or not at all, and says so on every rank."""

import json

import pytest
import torch
from saved import trained

from diffusion_trainer.training import checkpoints, saving
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.sharding import Replicated


@pytest.fixture
def sharding():
    return trained()


def save(root, images, sharding, keep=2):
    return checkpoints.save(root, images, sharding, {"run_id": "x"}, Agreement(), keep)


def test_what_is_saved_is_loaded_bitwise(tmp_path, sharding):
    save(tmp_path, 64, sharding)
    torch.manual_seed(1)
    other = torch.nn.Linear(3, 2)
    fresh = Replicated(other, torch.optim.AdamW(other.parameters(), lr=0.1))
    checkpoint = checkpoints.Checkpoint(checkpoints.latest(tmp_path))
    checkpoints.load(checkpoint, fresh)
    assert checkpoint.images_seen == 64
    assert checkpoint.manifest["state"] == {"run_id": "x"}
    for a, b in zip(sharding.masters(), fresh.masters(), strict=True):
        assert torch.equal(a, b)
        ours, theirs = sharding.optimizer.state[a], fresh.optimizer.state[b]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(checkpoint.whole("ema")["weight"], sharding.optimizer.state[sharding.model.weight]["ema"])


@pytest.mark.parametrize("broken", ["write_tensors", "write_manifest", "write_text", "sync", "_manifest"])
def test_a_save_that_fails_anywhere_leaves_the_one_before(tmp_path, sharding, monkeypatch, broken):
    save(tmp_path, 64, sharding)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise OSError("No space left on device")

        patch.setattr(saving, broken, fail)
        with pytest.raises(OSError, match="could not be written: No space left on device; the one before it is intact"):
            save(tmp_path, 128, sharding)
    assert checkpoints.Checkpoint(checkpoints.latest(tmp_path)).images_seen == 64
    assert not list(tmp_path.glob(".*part"))
    save(tmp_path, 128, sharding)
    assert checkpoints.Checkpoint(checkpoints.latest(tmp_path)).images_seen == 128


def test_a_full_disk_is_an_oserror_and_nothing_else(tmp_path, sharding):
    """A real one would need a mount; a path that is a file fails in the same call."""
    (tmp_path / ".images-000000000064.part").write_text("in the way")
    with pytest.raises(OSError, match="could not be written"):
        save(tmp_path, 64, sharding)


def test_only_the_newest_are_kept_and_never_the_one_just_written(tmp_path, sharding):
    for images in (64, 128, 192):
        save(tmp_path, images, sharding)
    assert sorted(p.name[-3:] for p in tmp_path.glob("images-*")) == ["128", "192"]
    save(tmp_path, 96, sharding, keep=1)  # somebody went back
    assert checkpoints.latest(tmp_path).name == "images-000000000096"


def test_latest_falls_back_to_a_whole_one(tmp_path, sharding):
    save(tmp_path, 64, sharding)
    save(tmp_path, 128, sharding)
    (tmp_path / "images-000000000128" / "manifest.json").unlink()
    assert checkpoints.latest(tmp_path).name == "images-000000000064"
    (tmp_path / "latest").write_text("../../somewhere")
    assert checkpoints.latest(tmp_path).name == "images-000000000064"
    assert checkpoints.latest(tmp_path / "none") is None


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path, sharding):
    folder = save(tmp_path, 64, sharding)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    json.loads((folder / "manifest.json").read_text())


def test_a_parameter_may_have_any_name(tmp_path):
    model = torch.nn.ModuleDict({"8x8/conv": torch.nn.Linear(3, 2)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    folder = checkpoints.save(tmp_path, 1, Replicated(model, optimizer), {}, Agreement(), 2)
    assert torch.equal(checkpoints.Checkpoint(folder).whole("weight")["8x8/conv.weight"], model["8x8/conv"].weight)
