"""Disks and network file systems that do not answer, or vanish: waited for, then the end of a run, and never damage."""

import errno
import io
import os
from pathlib import Path

import pytest
from streaming.making import write_set

from diffusion_trainer.conventions import PassingError
from diffusion_trainer.streaming import stores
from diffusion_trainer.streaming.retries import Retries
from diffusion_trainer.streaming.samples import Samples
from diffusion_trainer.streaming.stores import LocalStore


@pytest.fixture
def folder(tmp_path) -> Path:
    write_set(tmp_path / "mount", [3, 0, 5])
    return tmp_path / "mount"


def opened(folder: Path) -> Samples:
    store = LocalStore()
    return Samples(store.find(f"{folder}/*.tar"), store, 1 << 20)


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(stores, "RETRIES", Retries(3, 0.0))


class Failing:
    """A call of the system that fails so many times, and then does what it did."""

    def __init__(self, call, code: int, times: int):
        self.call, self.code, self.times = call, code, times

    def __call__(self, *arguments):
        self.times -= 1
        if self.times >= 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.call(*arguments)


ILLNESSES = pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
CALLS = pytest.mark.parametrize("call", ["open", "preadv"])


@ILLNESSES
@CALLS
def test_a_file_system_that_does_not_answer_is_no_damage(folder, monkeypatch, patience, code, call):
    samples = opened(folder)
    samples.span(0, 0)
    monkeypatch.setattr(os, call, Failing(getattr(os, call), code, 1000))
    with pytest.raises(PassingError, match=rf"x-000\.tar cannot be had: {os.strerror(code)}.*tried 4 times"):
        samples.read(0, 0)


@ILLNESSES
@CALLS
def test_one_that_answers_again_changes_no_sample(folder, monkeypatch, patience, code, call):
    samples = opened(folder)
    samples.span(0, 0)
    monkeypatch.setattr(os, call, failing := Failing(getattr(os, call), code, 3))
    assert bytes(samples.read(0, 0)["cls"]) == b"0"
    assert failing.times < 0


def test_a_stale_handle_is_opened_again(folder, monkeypatch, patience):
    """As NFS' are once the server has another file of that name: the old handle stays stale for ever."""
    samples, preadv, stale = opened(folder), os.preadv, set()
    samples.read(0, 0)
    stale.update(samples.store._files.values())

    def read(descriptor, *arguments):
        if descriptor in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return preadv(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "close", lambda descriptor: None)  # so that the new handle has another number
    assert bytes(samples.read(0, 1)["cls"]) == b"1"


@pytest.mark.parametrize("sidecars", [False, True], ids=["before its index is read", "after"])
def test_a_mount_that_vanishes_is_no_missing_shard_and_when_it_is_back_all_goes_on(folder, patience, sidecars):
    samples, elsewhere = opened(folder), folder.with_name("elsewhere")
    samples.read(0, 0)  # which stays open
    if sidecars:
        samples.span(2, 0)
    folder.rename(elsewhere)
    folder.mkdir()  # the mount point
    with pytest.raises(PassingError, match=r"x-002\.tar.* cannot be had: index\.json beside it is gone, too"):
        samples.read(2, 0)
    folder.rmdir()
    elsewhere.rename(folder)
    assert bytes(samples.read(2, 0)["cls"]) == b"3"


@pytest.mark.parametrize("call", ["listdir", "open"])
def test_a_folder_that_answers_the_second_time_is_found(folder, monkeypatch, patience, call):
    truth = LocalStore().find(f"{folder}/*.tar")
    module = os if call == "listdir" else io
    monkeypatch.setattr(module, call, failing := Failing(getattr(module, call), errno.EIO, 2))
    assert LocalStore().find(f"{folder}/*.tar") == truth
    assert failing.times < 0
