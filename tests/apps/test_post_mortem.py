"""Who ended a run, told from what its ranks have left: the cause, not those who fail because they have lost it."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from diffusion_trainer.apps import post_mortem
from diffusion_trainer.apps.post_mortem import Blame, culprit, recorded, screen
from diffusion_trainer.callbacks import attempts
from diffusion_trainer.callbacks.last_words import HANG, SUSPENDED, RankFiles, State, write_failure
from diffusion_trainer.callbacks.watchdog import HUNG
from diffusion_trainer.conventions import PassingError, UserError

LOST = "RuntimeError: [enforce fail] Connection closed by peer [127.0.0.1]:1234"
LOST_BY_LIBRARIES = (
    "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete",
    "DistBackendError: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "DistBackendError: NCCL failure: remote process exited or there was a network error",
    "DistBackendError: NCCL communicator was aborted on rank 0.",
    "DistBackendError: NCCL error\nLast error:\nsocketProgress: Connection closed by remote peer node1<41234>",
)
HUNG_WORDS = f"{HANG} 6 s; all stacks are in there"


@pytest.fixture
def logs(tmp_path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def state(rank: int, doing: str = "a training step") -> State:
    return State(rank, 3, f"node{rank}", 100 + rank, doing, 30 + rank, 480 + 16 * rank, time.time() - 7)


def speak(logs: Path, rank: int, what: str, at: int, doing: str = "a training step") -> None:
    files = RankFiles(logs, rank)
    write_failure(files, state(rank, doing), what, [f'  File "x.py", line {n}, in f{n}\n' for n in range(30)])
    os.utime(files.failed, ns=(at, at))


CASES = {  # what ranks said, in that order (rank, words, doing); exit codes; who is to blame, and how
    "an exception, before its peer lost it": (
        [(1, "ValueError: no", "x"), (0, LOST, "x")], {0: 1, 1: 1}, Blame(1, "failed with exit code 1")),
    "an exception of a rank that is slower to end than its peers": (
        [(2, "ValueError: no", "x"), (0, LOST, "x")], {0: 1}, Blame(2, "failed")),
    "a killed rank, whose peer has failed": (
        [(0, LOST, "x")], {0: 1, 1: -9}, Blame(1, "was killed by SIGKILL (perhaps the memory did not suffice)")),
    "a fault of memory": ([(0, LOST, "x")], {1: -11}, Blame(1, "was killed by SIGSEGV")),
    "a library that aborts once its peer has failed": (
        [(1, "ValueError: no", "x")], {0: -6, 1: 1}, Blame(1, "failed with exit code 1")),
    "a library that aborts": ([], {2: -6}, Blame(2, "was killed by SIGABRT")),
    "a mistake that one rank alone can see": (
        [(0, LOST, "x")], {0: 1, 2: 2}, Blame(2, "failed with exit code 2")),
    "a stopped rank: the others wait for it": (
        [(0, HUNG_WORDS, "x"), (2, HUNG_WORDS, "x")], {0: HUNG}, Blame(1, "was not heard of (stopped, or lost)")),
    "a suspended rank that was woken to be ended, and spoke then": (
        [(0, HUNG_WORDS, "waiting for data"), (1, HUNG_WORDS, "x"), (2, f"{HANG} 17 s, {SUSPENDED} 16 s of them", "x")],
        {}, Blame(2, "hung")),
    "a rank without data: the others wait for it": (
        [(0, HUNG_WORDS, "x"), (2, HUNG_WORDS, "waiting for data"), (1, HUNG_WORDS, "x")], {0: HUNG, 2: HUNG, 1: HUNG},
        Blame(2, "hung")),
    "a rank without data that is slower to end than its peers": (
        [(0, HUNG_WORDS, "x"), (1, HUNG_WORDS, "waiting for data"), (2, HUNG_WORDS, "x")], {0: HUNG}, Blame(1, "hung")),
    "a rank without data, whose peers have not said a word yet": (
        [(1, HUNG_WORDS, "waiting for data")], {1: HUNG}, Blame(1, "hung")),
    "a hang of all": ([(r, HUNG_WORDS, "x") for r in (2, 0, 1)], dict.fromkeys(range(3), HUNG), Blame(2, "hung")),
    "under SLURM, a killed rank": (
        [(0, LOST, "x"), (2, LOST, "x")], {}, Blame(1, "was not heard of (stopped, or lost)")),
    "under SLURM, an exception": ([(1, "ValueError: no", "x"), (0, LOST, "x")], {}, Blame(1, "failed")),
    "before any rank could say a word": ([], {1: 1}, Blame(1, "failed with exit code 1")),
    "nothing is known": ([], {}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_the_cause_is_blamed(logs, case):
    words, codes, expected = CASES[case]
    for at, (rank, what, doing) in enumerate(words):
        speak(logs, rank, what, at * 10**9, doing)
    assert culprit(logs, codes, world=3) == expected


def test_the_end_of_workers_that_a_hung_rank_kills_does_not_take_its_words_away(logs):
    def hang() -> None:
        speak(logs, 1, HUNG_WORDS, 0)
        raise PassingError("a worker was killed")

    with pytest.raises(PassingError), recorded(logs, 1, 2):
        hang()
    assert HUNG_WORDS in RankFiles(logs, 1).failed.read_text()


@pytest.mark.parametrize("words", LOST_BY_LIBRARIES)
def test_a_rank_that_its_library_tells_of_a_lost_peer_is_not_to_blame(logs, words):
    speak(logs, 0, words, 1)
    assert culprit(logs, {}, world=2) == Blame(1, "was not heard of (stopped, or lost)")


def test_one_screen_has_what_a_person_asks_first(tmp_path, logs):
    for rank in (0, 1):
        RankFiles(logs, rank).state.write_text(state(rank).json())
    speak(logs, 1, "ValueError: no", 1)
    for attempt in (1, 2):
        log = RankFiles(logs, 1, attempt).log
        log.parent.mkdir()
        log.write_text("much\n" * 1000)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("images-000000000320")
    blame, command = Blame(1, "failed with exit code 1"), "diffusion-trainer train 'data.shards=a b'"
    text = screen(tmp_path, blame, {1: 1}, 3, command, attempt=2)
    lines = text.splitlines()
    assert len(lines) < 30
    assert lines[0].startswith(f"post-mortem of {tmp_path}, ")
    assert lines[0].endswith(": rank 1 of 3 failed with exit code 1; the others were stopped.")
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["0", "node0", "30", "480"], ["*", "1", "node1", "31"], ["2", "?", "?", "?"],
    ]  # fmt: skip
    assert "failed with exit code 1; a training step, 7 s ago" in lines[3]
    assert "ValueError: no" in lines
    assert "in f29" in text  # the innermost of thirty
    assert "in f18" in text
    assert "in f17" not in text
    assert f"files in {logs}: attempt-2/rank-1.log, failed-rank-1.txt\n" in text
    assert lines[-2].startswith("The newest checkpoint, images-000000000320, stands: run the same command again")
    assert lines[-1] == "  diffusion-trainer train 'data.shards=a b'"


def test_a_thousand_ranks_are_one_screen_too(tmp_path, logs):
    for rank in range(1000):
        speak(logs, rank, LOST, rank)
    text = screen(tmp_path, Blame(700, "was killed by SIGKILL"), {700: -9}, 1000)
    assert len(text.splitlines()) < 45
    assert "and 984 more" in text
    assert "There is no checkpoint yet" in text


def broken(files: RankFiles, state: State | None, error: Exception | None = None) -> None:
    """Trains until `state`, then fails."""
    with recorded(files.logs, files.rank, 3):
        if state:
            files.state.write_text(state.json())
        raise error or ZeroDivisionError("none")


def test_an_error_is_recorded_with_its_innermost_frames_and_goes_on_its_way(logs):
    files = RankFiles(logs, 1)
    files.state.write_text(state(1).json())  # of an earlier start
    with pytest.raises(ZeroDivisionError):
        broken(files, state(1, "an evaluation"))
    words = files.failed.read_text()
    assert ": rank 1 of 3 on node1 (pid 101), at step 31, 496 images (an evaluation):\nZeroDivisionError: none" in words
    assert "in broken" in words


def test_an_error_before_anything_is_recorded_as_well(tmp_path):
    files = RankFiles(tmp_path / "logs", 1)
    with pytest.raises(ZeroDivisionError):
        broken(files, None)
    assert f"(pid {os.getpid()}), at step 0, 0 images (the start)" in files.failed.read_text()


def test_a_disk_that_takes_no_words_hides_no_error(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    RankFiles(tmp_path / "logs", 0).failed.with_name(".failed-rank-0.txt.part").mkdir()
    with pytest.raises(ZeroDivisionError) as caught:
        broken(RankFiles(tmp_path / "logs", 0), None)
    assert "failed-rank-0.txt could not be written" in caught.value.__notes__[0]
    (tmp_path / "logs" / f".{post_mortem.FILE}.part").mkdir()
    post_mortem.tell(tmp_path, "who it was", sys.stdout)
    said = capsys.readouterr().out
    assert said.startswith("who it was\n")
    assert f"{post_mortem.FILE} could not be written" in said


def test_a_mistake_of_the_user_is_none_and_what_an_earlier_start_has_left_is_gone(logs):
    speak(logs, 1, "of an earlier start", 1)
    with pytest.raises(UserError), recorded(logs, 1, 2):
        raise UserError("no")
    assert list(logs.iterdir()) == []
    for rank in range(3):
        speak(logs, rank, "of an earlier start", 1)
        RankFiles(logs, rank).state.write_text(state(rank).json())
    (logs / post_mortem.FILE).write_text("")
    post_mortem.put_away(logs)
    assert list(logs.iterdir()) == []  # there is no attempt whose they could be


def test_a_job_script_can_show_it(tmp_path, logs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["post_mortem", str(tmp_path)])
    post_mortem.main()
    assert capsys.readouterr().out == ""  # of a run that did not fail
    speak(logs, 0, LOST, 1)
    RankFiles(logs, 2).state.write_text(state(2).json())
    speak(logs, 2, LOST, 2)
    post_mortem.main()
    said = capsys.readouterr().out
    assert ": rank 1 of 3 was not heard of (stopped, or lost);" in said
    assert (logs / post_mortem.FILE).read_text() == said


def test_words_of_an_earlier_start_are_not_those_of_one_that_dies_at_once(tmp_path, logs, monkeypatch, capsys):
    speak(logs, 0, "ValueError: of an earlier start", 1)
    RankFiles(logs, 1).state.write_text(state(1).json())
    now = time.time()
    os.utime(RankFiles(logs, 0).failed, (now, now - 90))
    os.utime(RankFiles(logs, 1).state, (now, now - 60))
    attempts.begin(logs)  # theirs
    for seconds, expected in ((100, True), (70, True), (40, False)):
        monkeypatch.setattr(sys, "argv", ["post_mortem", str(tmp_path), "1", "sbatch ...", str(seconds)])
        post_mortem.main()
        said = capsys.readouterr().out
        assert (said != "") == expected
        assert ("ValueError" in said) == (seconds == 100)
    (kept,) = logs.glob("attempt-*/failed-rank-0.txt")
    assert "of an earlier start" in kept.read_text()


def test_the_clock_of_the_files_decides_whose_words_they_are(tmp_path, logs, monkeypatch, capsys):
    """That of a file server which is an hour behind this node."""
    speak(logs, 0, "ValueError: of this start", 1)
    touch = Path.touch

    def behind(path: Path) -> None:
        touch(path)
        os.utime(path, (time.time() - 3600,) * 2)

    behind(RankFiles(logs, 0).failed)
    monkeypatch.setattr(Path, "touch", behind)
    monkeypatch.setattr(sys, "argv", ["post_mortem", str(tmp_path), "1", "sbatch ...", "30"])
    post_mortem.main()
    assert "ValueError: of this start" in capsys.readouterr().out
    assert not list(logs.glob(".now*"))


def shown(folder, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["post_mortem", str(folder)])
    post_mortem.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("left", [state(2).json(), '{"rank": 2, "wor'])
def test_ranks_that_were_killed_before_anybody_could_say_a_word_have_a_screen(
    tmp_path, logs, monkeypatch, capsys, left
):
    RankFiles(logs, 2).state.write_text(left)
    lines = shown(tmp_path, monkeypatch, capsys).splitlines()
    assert lines[0].endswith(
        ": no rank has left a word; it was killed by SIGKILL (perhaps the memory did not suffice)."
    )
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["0", "?", "?"], ["1", "?", "?"], ["2", "node2", "32"] if left.endswith("}") else ["2", "?", "?"],
    ]  # fmt: skip


def test_ranks_that_an_earlier_start_had_more_are_not_to_blame(tmp_path, logs, monkeypatch, capsys):
    for rank in range(4):
        speak(logs, rank, "of an earlier start", 1 + rank)
        RankFiles(logs, rank).state.write_text(state(rank).json())
    for rank in (1, 0):
        with pytest.raises(ZeroDivisionError), recorded(logs, rank, 2):
            raise ZeroDivisionError(f"of rank {rank}")
    assert {path.name for path in logs.iterdir()} == {"failed-rank-0.txt", "failed-rank-1.txt"}
    said = shown(tmp_path, monkeypatch, capsys)
    assert "of an earlier start" not in said
    assert ": rank 1 of 2 failed; the others were stopped." in said


def test_what_an_attempt_has_left_goes_into_its_folder_before_the_next(logs):
    assert (attempts.begin(logs), attempts.begin(logs)) == (1, 2)
    for rank in range(2):
        speak(logs, rank, "of the second attempt", 1)
        RankFiles(logs, rank).state.write_text(state(rank).json())
        RankFiles(logs, rank).stacks.write_text("of the second attempt")
    (logs / post_mortem.FILE).write_text("of the second attempt")
    post_mortem.put_away(logs)
    assert attempts.begin(logs) == 3
    left = {str(path.relative_to(logs)) for path in logs.rglob("*") if path.is_file()}
    names = [post_mortem.FILE, *(f"{kind}-rank-{rank}.txt" for kind in ("failed", "stacks") for rank in range(2))]
    assert left == {f"attempt-2/{name}" for name in names}


def test_where_ranks_start_by_themselves_the_first_puts_away_what_no_other_can_have_written_yet(logs):
    attempts.begin(logs)
    (logs / post_mortem.FILE).write_text("of the first attempt")
    RankFiles(logs, 1).stacks.write_text("of the first attempt")
    speak(logs, 1, "of this start already", 1)
    with recorded(logs, 0, 2):
        pass
    left = {str(path.relative_to(logs)) for path in logs.rglob("*") if path.is_file()}
    assert left == {f"attempt-1/{post_mortem.FILE}", "attempt-1/stacks-rank-1.txt", "failed-rank-1.txt"}


def test_a_job_script_names_the_logs_of_the_attempt_that_failed_and_of_no_other(tmp_path, logs, monkeypatch, capsys):
    for attempt in (1, 2):
        attempts.begin(logs)
        RankFiles(logs, 0, attempt).log.write_text("said\n")
    RankFiles(logs, 0).state.write_text(replace(state(0), attempt=2).json())
    said = shown(tmp_path, monkeypatch, capsys)
    assert f"files in {logs}: attempt-2/rank-0.log\n" in said
    RankFiles(logs, 0).state.write_text(state(0).json())  # of a start that ended before it had a number
    assert f"files in {logs}: none\n" in shown(tmp_path, monkeypatch, capsys)


def test_a_start_of_other_ranks_keeps_what_theirs_have_said(logs):
    speak(logs, 0, "of this start", 1)
    with recorded(logs, 1, 2):
        pass
    assert RankFiles(logs, 0).failed.is_file()


def test_a_store_that_does_not_answer_is_told_and_nobody_was_killed(tmp_path, logs, monkeypatch, capsys):
    with pytest.raises(PassingError):
        broken(RankFiles(logs, 0), state(0), PassingError("the store does not answer"))
    speak(logs, 1, LOST, 2 * time.time_ns())
    said = shown(tmp_path, monkeypatch, capsys)
    assert ": rank 0 of 3 failed;" in said
    assert "the store does not answer" in said
    assert "in broken" not in said


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "failed with exit code 1"),
        (HUNG, "hung"),
        (-signal.SIGBUS, "was killed by SIGBUS"),
        (-signal.SIGTERM, "was told to stop by SIGTERM"),
        (128 + signal.SIGUSR1, "was told to stop by SIGUSR1"),
        (128 + signal.SIGKILL, "was killed by SIGKILL (perhaps the memory did not suffice)"),
    ],
)
def test_ends_in_words(code, words):
    assert post_mortem.ending(code) == words


def test_a_job_that_was_told_to_stop_while_it_started_was_not_killed(tmp_path, logs, monkeypatch, capsys):
    RankFiles(logs, 0).state.write_text(state(0).json())
    monkeypatch.setattr(sys, "argv", ["post_mortem", str(tmp_path), "143"])
    post_mortem.main()
    assert ": no rank has left a word; it was told to stop by SIGTERM.\n" in capsys.readouterr().out


def test_a_job_script_may_say_how_its_job_goes_on(tmp_path, logs, monkeypatch, capsys):
    RankFiles(logs, 0).state.write_text(state(0).json())
    again = "cd '/my runs' && diffusion-trainer submit nodes=2 'data.shards=a b'"
    monkeypatch.setattr(sys, "argv", ["post_mortem", str(tmp_path), "137", again])
    post_mortem.main()
    assert capsys.readouterr().out.endswith(f": the same command begins anew:\n  {again}\n")


def test_what_is_told_has_no_secrets(tmp_path, logs, monkeypatch, capsys):
    monkeypatch.setenv("MY_TOKEN", "canary-of-a-token")
    post_mortem.tell(tmp_path, "diffusion-trainer train x=canary-of-a-token", sys.stdout)
    assert capsys.readouterr().out == (logs / post_mortem.FILE).read_text() == "diffusion-trainer train x=***\n"
