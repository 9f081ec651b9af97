"""What each rank has printed in each start of a run is kept, of the last starts."""

import errno
import io
import os
import sys
from types import SimpleNamespace

import pytest

from diffusion_trainer.callbacks import attempts
from diffusion_trainer.callbacks.attempts import KEPT, NUMBER, Start, begin, numbers, printing
from diffusion_trainer.callbacks.last_words import RankFiles
from diffusion_trainer.callbacks.run import RunCallback
from diffusion_trainer.conventions import UserError


def test_a_crash_loop_keeps_the_last_attempts(tmp_path):
    for number in range(1, 3 * KEPT):
        assert begin(tmp_path) == number
        RankFiles(tmp_path, 0, number).log.write_text("broken")
    assert numbers(tmp_path) == list(range(2 * KEPT, 3 * KEPT))


def test_starts_at_the_same_moment_have_numbers_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "numbers", lambda logs: [])  # neither sees the other's folder yet
    assert [begin(tmp_path), begin(tmp_path)] == [1, 2]


def said(logs, rank: int, attempt: int) -> str:
    return RankFiles(logs, rank, attempt).log.read_text()


def among(known: int | None) -> SimpleNamespace:
    """An agreement whose rank 0 knows the attempt."""
    return SimpleNamespace(gather=lambda mine: [known, mine])


def test_ranks_that_others_have_started_learn_the_attempt_as_they_meet_and_lose_nothing(tmp_path):
    begin(tmp_path)
    for rank in (0, 1):
        with printing() as log:
            start = Start(log, tmp_path, rank)
            print(f"rank {rank} imports")
            start.begin()
            start.meet(among(2), callbacks := [RunCallback()])
            print(f"rank {rank} trains", file=sys.stderr)
        assert callbacks[0].attempt == 2
        assert said(tmp_path, rank, 2) == f"rank {rank} imports\nrank {rank} trains\n"
    assert numbers(tmp_path) == [1, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_with_a_parent_has_that_ones_number_and_only_rank_0_copies(tmp_path, monkeypatch, rank):
    monkeypatch.setenv(NUMBER, str(begin(tmp_path)))
    with printing() as log:
        start = Start(log, tmp_path, rank)
        start.begin()
        start.meet(among(1), [])
        print("trains")
    assert numbers(tmp_path) == [1]
    assert RankFiles(tmp_path, rank, 1).log.exists() == (rank == 0)  # the parent gives rank 1's output to its file


def test_a_rank_that_prints_nothing_makes_no_file(tmp_path):
    with printing() as log:
        log.keep(RankFiles(tmp_path, 7, 1))
    assert list(tmp_path.iterdir()) == []


def broken(files: RankFiles, error: Exception) -> None:
    with printing() as log:
        log.keep(files)
        raise error


def test_the_log_has_what_a_rank_ended_with(tmp_path):
    for attempt, error in enumerate((ZeroDivisionError("none"), UserError("say what")), 1):
        with pytest.raises(type(error)):
            broken(RankFiles(tmp_path, 0, attempt), error)
    assert said(tmp_path, 0, 1).endswith("raise error\nZeroDivisionError: none\n")
    assert said(tmp_path, 0, 2) == "error: say what\n"


def test_it_is_on_the_disk_at_once(tmp_path):
    with printing() as log:
        log.keep(RankFiles(tmp_path, 0, 1))
        print("now", end="")
        assert said(tmp_path, 0, 1) == "now"


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "attempt-1").write_text("a file where the folder should be")
    with printing() as log:
        log.keep(RankFiles(tmp_path, 0, 1))
        print("one")
        print("two")
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\n"
    assert captured.err.count("WARNING") == 1
    assert "rank-0.log cannot be written (Not a directory)" in captured.err or "File exists" in captured.err


def test_a_disk_that_is_full_for_a_while_makes_a_gap_and_one_that_takes_little_at_once_none(
    tmp_path, monkeypatch, capsys
):
    errors = [OSError(errno.ENOSPC, "No space left on device")] * 2

    def write(descriptor: int, data: bytes) -> int:
        if errors:
            raise errors.pop()
        return real(descriptor, data[:3])

    real = os.write
    with printing() as log:
        log.keep(RankFiles(tmp_path, 0, 1))
        monkeypatch.setattr(os, "write", write)
        print("one")  # two writes: the text, and the end of the line
        print("two and more")
    monkeypatch.undo()
    assert said(tmp_path, 0, 1).endswith("two and more\n")
    assert capsys.readouterr().err.count("WARNING") == 1


class Gone(io.StringIO):
    """A terminal that was closed after the first line, or a pipe that nobody reads any more."""

    def flush(self) -> None:
        if "step 0" in self.getvalue():
            raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_has_gone_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := Gone())
    with printing() as log:
        log.keep(RankFiles(tmp_path, 0, 1))
        for i in range(3):
            print("step", i, flush=True)
    assert sys.stdout is terminal
    assert terminal.getvalue() == "step 0\n"  # and it is not asked again
    assert said(tmp_path, 0, 1) == "step 0\nstep 1\nstep 2\n"


class Busy(io.StringIO):
    """A pipe that is full for a moment."""

    def flush(self) -> None:
        if self.getvalue() == "step 0\n":
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def test_a_pipe_that_is_full_for_a_moment_is_written_to_again(monkeypatch):
    monkeypatch.setattr(sys, "stdout", pipe := Busy())
    with printing():
        for i in range(2):
            print("step", i, flush=True)
    assert pipe.getvalue() == "step 0\nstep 1\n"
