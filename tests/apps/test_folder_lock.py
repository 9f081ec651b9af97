"""Who may write to a run's folder."""

import errno
import fcntl
import time
from contextlib import ExitStack
from threading import Thread
from types import SimpleNamespace

import pytest

from diffusion_trainer.apps import folder_lock
from diffusion_trainer.callbacks.job_starts import STOP, JobStart
from diffusion_trainer.callbacks.run import Run
from diffusion_trainer.conventions import PassingError, UserError

FOR_THE_FIRST = JobStart("77", 0).stop_file  # of its two starts here


def told_to_stop(folder) -> bool:
    """Whether a run of this process is."""
    return Run(folder, None, None, SimpleNamespace(rank=0), None, None, None).told_to_stop()


@pytest.fixture
def lost(tmp_path, monkeypatch):
    """lost(stops): an earlier start of job 77 that trains in the folder, until it is told to stop, or until the context
    that this returns is left.
    """
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with ExitStack() as stack:

        def lost(stops: bool) -> ExitStack:
            folder = stack.enter_context(ExitStack())
            folder.enter_context(folder_lock.held(tmp_path))

            def train() -> None:
                while not FOR_THE_FIRST(tmp_path).exists():
                    time.sleep(0.01)
                folder.close()

            if stops:
                thread = Thread(target=train)
                thread.start()
                stack.callback(thread.join)
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
            return folder

        yield lost


def test_a_start_on_a_node_that_slurm_has_lost_is_told_to_stop_by_the_next_one(tmp_path, lost, capsys):
    lost(stops=True)
    with folder_lock.held(tmp_path):
        assert not FOR_THE_FIRST(tmp_path).exists()
        assert folder_lock.is_locked(tmp_path / ".lock")
    assert "an earlier start of job 77 still trains in" in capsys.readouterr().out
    assert not folder_lock.is_locked(tmp_path / ".lock")


def test_one_that_does_not_stop_costs_this_start_and_the_job_may_begin_again(tmp_path, lost, monkeypatch):
    lost(stops=False)
    monkeypatch.setattr(folder_lock, "LOST_SECONDS", 0)
    with pytest.raises(PassingError, match="an earlier start of job 77 has not stopped"), folder_lock.held(tmp_path):
        pass


@pytest.mark.parametrize(("job", "restarts"), [("77", "0"), ("78", "1"), ("", "1")])
def test_whoever_else_trains_there_is_left_alone(tmp_path, lost, monkeypatch, job, restarts):
    lost(stops=False)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    with pytest.raises(UserError, match="another process is training in"), folder_lock.held(tmp_path):
        pass
    assert not list(tmp_path.glob(f"{STOP}*"))


def test_one_that_has_lost_its_node_while_it_waited_leaves_a_later_start_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with folder_lock.held(tmp_path):
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with pytest.raises(UserError, match="another process is training in"), folder_lock.held(tmp_path):
            pass
    assert not list(tmp_path.glob(f"{STOP}*"))


@pytest.mark.parametrize(("job", "restarts"), [("77", "2"), ("78", "0"), ("", "0")])
def test_what_a_start_that_gave_up_or_was_killed_leaves_there_stops_only_the_lost_one(
    tmp_path, lost, monkeypatch, job, restarts
):
    """Killed, it takes nothing away; when it gives up it must not: the lost one has still to see it."""
    with lost(stops=False):
        monkeypatch.setattr(folder_lock, "LOST_SECONDS", 0)
        with pytest.raises(PassingError), folder_lock.held(tmp_path):
            pass
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        assert told_to_stop(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    with folder_lock.held(tmp_path):
        assert not told_to_stop(tmp_path)
        assert not list(tmp_path.glob(f"{STOP}*"))


def test_a_stop_by_hand_is_for_whoever_trains_there(tmp_path):
    (tmp_path / STOP).touch()
    with folder_lock.held(tmp_path):
        assert told_to_stop(tmp_path)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(*_) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match=r"\.lock cannot be locked \(Function not implemented\)"),
        folder_lock.held(tmp_path),
    ):
        pass
    with pytest.raises(UserError, match="mount that file system with locks"):
        folder_lock.is_locked(tmp_path / ".lock")


def test_a_file_where_the_logs_have_to_be_is_said_before_anything_starts(tmp_path):
    (tmp_path / "logs").write_text("mine")
    with (
        pytest.raises(UserError, match=r"cannot be written \(.*logs'\); choose another folder="),
        folder_lock.held(tmp_path),
    ):
        pytest.fail("it was held")
