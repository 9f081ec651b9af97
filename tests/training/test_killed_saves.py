"""kill -9 at every instant of a save: what was there before, or what was being saved, is there whole."""

import os
import shutil
import signal
import sys
from multiprocessing import Pipe

import pytest
from saved import Half, Piped, content, ended, forked, read, same, save, save_by_two, trained

from diffusion_trainer.training import checkpoint_files, checkpoints, resuming
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoints import Checkpoint
from diffusion_trainer.training.saving import folders

CHANGES = ("open", "os.", "shutil.")  # audit events of what changes a disk
WRITERS = {checkpoint_files.write_tensors.__code__, checkpoint_files.write_text.__code__}  # writing is no such event
NEW = 1  # the seed of what is being saved


class Instants:
    """Sends this process SIGKILL at the n-th instant: before a call that changes a disk, or a line that may write."""

    def __init__(self, last: int):
        self.left = last

    def pass_one(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        os.fsync = lambda descriptor: self.pass_one()  # SIGKILL does not lose what the kernel has
        sys.addaudithook(lambda event, _: self.pass_one() if event.startswith(CHANGES) else None)
        sys.settrace(self.trace)

    def trace(self, frame, event, _):
        if frame.f_code not in WRITERS:
            return None
        if event == "line":
            self.pass_one()
        return self.trace


def killed_one(root, images, last) -> bool:
    """Saves in a process of its own; whether it was killed at the `last` instant (it may have ended before)."""

    def work():
        sharding = trained(NEW)
        Instants(last).watch()
        save(root, images, sharding, keep=1)

    code = ended(forked(work))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def killed_of_two(dying):
    """The same for one of two ranks that are processes; the other is left alone with what that means."""

    def kill(root, images, last) -> bool:
        ends = Pipe()

        def work(rank):
            ends[1 - rank].close()
            sharding = Half(trained(NEW), rank)
            if rank == dying:
                Instants(last).watch()
            checkpoints.save(root, images, sharding, {}, Piped(rank, ends[rank]), 1)

        pids = [forked(lambda rank=rank: silently(lambda: work(rank))) for rank in (0, 1)]
        for end in ends:
            end.close()
        codes = [ended(pid) for pid in pids]
        assert codes[dying] in (0, -signal.SIGKILL)
        return codes[dying] != 0

    return kill


def silently(work) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (of a process that ends here)
    work()


KILLERS = {"one": killed_one, "first of two": killed_of_two(0), "second of two": killed_of_two(1)}


def check(found, images, old, new) -> bool:
    """Whether it is the new one; if not, it is the old one, or there has been none."""
    is_new = found is not None and same(read(found), new)
    if is_new:
        assert found.images_seen == (images or 64)
    elif images:
        assert found.images_seen == 64
        assert same(read(found), old)
    else:
        assert found is None
    return is_new


@pytest.mark.parametrize("images", [128, 64, None], ids=["the next", "the same again", "the first"])
@pytest.mark.slow
@pytest.mark.parametrize("who", list(KILLERS))
def test_at_every_instant_there_is_a_whole_checkpoint(tmp_path, monkeypatch, who, images):
    """keep=1, so that each save also deletes the one before it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    root, two = tmp_path / "checkpoints", who != "one"
    old, new = content(trained(64)), content(trained(NEW))
    assert save_by_two(tmp_path / "before", 64) == [None, None] if two else save(tmp_path / "before", 64)
    seen = set()
    for last in range(1, 10_000):
        shutil.rmtree(root, ignore_errors=True)
        if images:
            shutil.copytree(tmp_path / "before", root)
        was_killed = KILLERS[who](root, images or 64, last)
        found = resuming.resumable(root, Agreement())
        seen.add(check(found.checkpoint, images, old, new))
        assert found.damage == []
        assert all(read(Checkpoint(folder)) for folder in folders(root))  # whatever has a checkpoint's name is one
        if not was_killed:
            break
        if last % 10 == 0:  # whatever was left lying about is gone with the next save
            save(root, 192, keep=1)
            assert sorted(p.name for p in root.iterdir()) == ["images-000000000192", "latest"]
    assert last > 40
    assert seen == {False, True}
