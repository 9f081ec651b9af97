"""Saving in the background: what is saved is what was there when it began, and what fails is told once."""

import json
import os
import shutil
import tempfile
import threading
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from saved import content, read, same, save, save_by_two, trained
from small_disks import fill, mounted

import diffusion_trainer
from diffusion_trainer.training import checkpoints, resuming, saving
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoints import Checkpoint
from diffusion_trainer.training.saving import Saver
from diffusion_trainer.training.sharding import Replicated


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until it is opened."""
    opened, write = threading.Event(), saving.write

    def wait_and_write(*arguments):
        assert opened.wait(30)
        return write(*arguments)

    monkeypatch.setattr(saving, "write", wait_and_write)
    yield opened
    opened.set()


def saver(root, sharding, keep=2):
    return Saver(root, sharding, Agreement(), keep)


def test_training_goes_on_meanwhile_and_does_not_change_what_is_saved(tmp_path, gate):
    sharding = trained()
    before, state = content(sharding), {"evaluations": []}
    saves = saver(tmp_path, sharding)
    saves.begin(64, state)
    sharding.optimizer.step()
    state["evaluations"].append(1)
    assert checkpoints.latest(tmp_path) is None
    gate.set()
    saves.wait()
    found = Checkpoint(checkpoints.latest(tmp_path))
    assert same(read(found), before)
    assert not same(read(found), content(sharding))
    assert found.manifest["state"] == {"evaluations": []}
    saves.begin(128, state)  # in the memory of the one before
    saves.wait()
    assert same(read(Checkpoint(checkpoints.latest(tmp_path))), content(sharding))


def test_one_at_a_time(tmp_path, gate):
    saves = saver(tmp_path, trained())
    saves.begin(64, {})
    with pytest.raises(RuntimeError, match="has not been waited for"):
        saves.begin(128, {})
    gate.set()
    saves.wait()


def test_an_error_is_known_when_it_has_happened_and_raised_once(tmp_path, monkeypatch):
    saves = saver(tmp_path, trained())
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", fails)
        saves.begin(64, {})
        with pytest.raises(OSError, match="could not be written: No space left on device; the one before it is intact"):
            saves.wait()
    assert not saves.failed
    saves.wait()
    saves.begin(64, {})
    saves.wait()
    assert Checkpoint(checkpoints.latest(tmp_path)).images_seen == 64


def test_a_failure_shows_before_anybody_waits(tmp_path, monkeypatch):
    saves = saver(tmp_path, trained())
    monkeypatch.setattr(saving, "write_tensors", fails)
    saves.begin(64, {})
    saves._thread.join()
    assert saves.failed
    with pytest.raises(OSError, match="No space"):
        saves.wait()


def fails(*_):
    raise OSError("No space left on device")


def test_memory_is_made_before_the_first_save_and_kept(tmp_path):
    """New memory takes ten times as long to copy to."""
    sharding = trained()
    saves = saver(tmp_path, sharding)
    saves.reserve()
    saves.wait()
    places = {key: buffer.data_ptr() for key, buffer in saves.snapshots._buffers.items()}
    assert sum(buffer.numel() for buffer in saves.snapshots._buffers.values()) == sum(
        map(torch.numel, content(sharding).values())
    )
    for images in (64, 128):
        saves.begin(images, {})
        saves.wait()
        assert {key: buffer.data_ptr() for key, buffer in saves.snapshots._buffers.items()} == places


def test_state_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        saver(tmp_path, trained()).begin(64, {"run": object()})
    assert not list(tmp_path.iterdir())


def test_a_rank_that_holds_what_another_writes_copies_nothing(tmp_path):
    assert saving.Snapshots(trained(), 1).take(64, {}).tensors is None


@pytest.mark.parametrize("rank", [0, 1])
def test_if_one_rank_cannot_write_all_say_so_and_nothing_is_left(tmp_path, monkeypatch, rank):
    assert save_by_two(tmp_path, 64) == [None, None]
    write = saving.write_tensors

    def fail_on_one(path, tensors):
        return fails() if path.name == f"rank-{rank:05d}.safetensors" else write(path, tensors)

    monkeypatch.setattr(saving, "write_tensors", fail_on_one)
    errors = save_by_two(tmp_path, 128)
    assert all("No space left on device" in str(error) for error in errors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images-000000000064", "latest"]


def test_the_same_images_again_take_another_name(tmp_path):
    for seed in range(12):
        save(tmp_path, 64, trained(seed))
        found = Checkpoint(checkpoints.latest(tmp_path))
        assert same(read(found), content(trained(seed)))
        assert found.images_seen == 64
        assert len(list(tmp_path.glob("images-*"))) == 1
    assert found.folder.name == "images-000000000064-11"


def test_a_file_that_does_not_read_back_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_trainer.training.checkpoint_files.read_back", lambda path: None)
    with pytest.raises(OSError, match="is not what was written to it"):
        save(tmp_path, 64)
    assert checkpoints.latest(tmp_path) is None


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """What is asked of the disk, in its order: ("sync", path), ("name", path, new path), ("delete", path)."""
    asked, at = [], lambda path: str(Path(path).relative_to(tmp_path))
    fsync = os.fsync

    def synced(descriptor):
        asked.append(("sync", at(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def naming(original):
        return lambda old, new: asked.append(("name", at(old), at(new))) or original(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, naming(getattr(Path, name)))
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: asked.append(("delete", at(path))) or rmtree(path, **how))
    return asked


def test_all_is_on_the_disk_before_its_name_is_and_that_before_latest_and_that_before_the_old_one_goes(tmp_path, disk):
    """Whatever the disk's own order is: a loss of power leaves this checkpoint or the one before, too."""
    root = tmp_path / "root"
    save(root, 64, keep=1)
    disk.clear()
    save(root, 128, keep=1)
    part, whole, old = "root/.images-000000000128.part", "root/images-000000000128", "root/images-000000000064"
    assert disk == [
        ("sync", "."),  # the folder of checkpoints
        ("sync", f"{part}/rank-00000.safetensors"),
        ("sync", f"{part}/.manifest.json.part"),
        ("name", f"{part}/.manifest.json.part", f"{part}/manifest.json"),
        ("sync", part),  # by who writes a small file
        ("sync", part),  # the names of all files
        ("name", part, whole),
        ("sync", "root"),
        ("sync", "root/.latest.part"),
        ("name", "root/.latest.part", "root/latest"),
        ("sync", "root"),
        ("name", old, "root/.images-000000000064.old"),
        ("delete", "root/.images-000000000064.old"),
    ]


def test_the_manifest_says_what_wrote_it(tmp_path):
    sharding = trained()
    save(tmp_path, 64, replace(sharding, strategy="Ddp()"))
    versions = {library: metadata.version(library) for library in ("torch", "lightning", "deepspeed")}
    said = json.loads((checkpoints.latest(tmp_path) / "manifest.json").read_text())["written_by"]
    assert said == versions | {"diffusion_trainer": diffusion_trainer.__version__, "strategy": "Ddp()", "ranks": 1}
    assert all(said.values())


@pytest.mark.parametrize("every", [1, 3, 7, 10, 11, 40])
@pytest.mark.parametrize("keep", [1, 2, 5])
def test_one_is_always_as_far_back_as_is_asked_and_few_are_kept(every, keep):
    """Saved one by one: the newest `keep`, at most two more, one that reaches back, which does not grow old itself."""
    reach, there = 10, []
    for images in range(every, 60 * every, every):
        there = sorted(saving.kept([*there, images], keep, reach))
        assert there[-keep:] == list(range(images, 0, -every))[:keep][::-1]
        assert len(there) <= keep + 2
        old_enough = [n for n in there if n <= images - reach]
        assert bool(old_enough) == (images - reach >= every)
        assert not old_enough or images - max(old_enough) <= 2 * reach + max(keep, 2) * every
        assert len(old_enough) <= max(keep, 1)


def test_without_a_reach_the_newest_are_kept():
    assert saving.kept([1, 2, 3, 4], 2, 0) == {3, 4}
    assert saving.kept([5], 2, 0) == {5}


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "small", 256) as path:
        yield path


def big(seed):
    """Its checkpoint is some 100 kB: on the small disk there is room for two."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(80, 80)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 80)).sum().backward()
    optimizer.step()
    return Replicated(model, optimizer)


def test_a_full_disk_leaves_the_one_before_and_room_makes_the_next(small_disk):
    sharding = big(0)
    save(small_disk, 64, sharding)
    (small_disk / "other").write_bytes(bytes(110_000))
    with pytest.raises(
        OSError, match=r"could not be written: .*No space left on device.*; the one before it is intact"
    ):
        save(small_disk, 128, sharding)
    assert sorted(p.name for p in small_disk.iterdir()) == ["images-000000000064", "latest", "other"]
    assert same(read(resuming.resumable(small_disk, Agreement()).checkpoint), content(sharding))
    (small_disk / "other").unlink()
    save(small_disk, 128, sharding)
    assert checkpoints.latest(small_disk).name == "images-000000000128"


def test_nothing_goes_through_tmpdir(tmp_path, small_disk, monkeypatch):
    """It is another file system, and full."""
    fill(small_disk / "full")
    monkeypatch.setenv("TMPDIR", str(small_disk))
    monkeypatch.setattr(tempfile, "tempdir", None)
    save(tmp_path / "run", 64, big(0))
    assert [p.name for p in small_disk.iterdir()] == ["full"]
    assert same(read(Checkpoint(checkpoints.latest(tmp_path / "run"))), content(big(0)))
