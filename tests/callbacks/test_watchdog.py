"""A process that makes no progress ends by itself, whatever holds it; one that does is left alone."""

import itertools
import json
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from watched import ended, started

from diffusion_trainer.callbacks.last_words import HANG, SUSPENDED, RankFiles, State, state_of, write_state
from diffusion_trainer.callbacks.watchdog import HUNG, Watchdog

pytestmark = pytest.mark.slow


def ends(pid: int) -> bool:
    """Whether nothing is left of a process, at once or once its end has been noticed."""
    end = time.monotonic() + 10
    while (there := psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE) and (
        time.monotonic() < end
    ):
        time.sleep(0.02)
    return not there


def test_a_stuck_process_ends_with_its_stacks_and_last_words(tmp_path):
    done, stacks = ended(tmp_path, "sleeping_in_python")
    assert done.returncode == HUNG, done.stderr
    assert "hung: no progress for" in done.stderr
    assert "in sleeping_in_python" in stacks
    words = RankFiles(tmp_path, 3).failed.read_text()
    assert "rank 3 of 4 on " in words
    assert "at step 10, 160 images (a step):\nhung: no progress for " in words
    assert "in sleeping_in_python" in words
    assert state_of(RankFiles(tmp_path, 3)).images_seen == 160


@pytest.mark.parametrize("what", ["waiting_for_a_worker", "waiting_for_a_stopped_worker"])
def test_its_workers_are_asked_for_their_stacks_and_killed(tmp_path, what):
    done, stacks = ended(tmp_path, what)
    assert done.returncode == HUNG, done.stderr
    pid, stopped = int(done.stdout), what == "waiting_for_a_stopped_worker"
    assert f"worker process {pid}: {'T (stopped)' if stopped else 'S (sleeping)'}" in stacks
    assert f"in {what}" in stacks
    assert ("in sleeping_in_python" in stacks) != stopped
    assert ends(pid)


def test_python_itself_may_hang(tmp_path):
    done, stacks = ended(tmp_path, "holding_the_lock_of_python")
    assert done.returncode == 1, done.stderr
    assert "in holding_the_lock_of_python" in stacks


@pytest.mark.parametrize("what", ["beating", "answering", "asleep_while_a_worker_is_told"])
def test_one_that_beats_goes_on_and_leaves_nothing(tmp_path, what):
    done, _ = ended(tmp_path, what)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


def asleep(pid: int) -> bool:
    """Whether each thread of a process waits for something other than a processor or a disk."""
    return all("State:\tS" in (task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir())


def test_one_that_was_suspended_says_so(tmp_path):
    process = started(tmp_path, "waiting")
    process.stdout.readline()
    end = time.monotonic() + 20
    while (told := state_of(RankFiles(tmp_path, 3))) is None or told.doing != "a step" or not asleep(process.pid):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)  # the rest of what is allowed is no suspension
    process.send_signal(signal.SIGCONT)
    assert process.wait(20) == HUNG
    assert re.search(rf"{HANG} [5-7] s, {SUSPENDED} [45] s of them; all", RankFiles(tmp_path, 3).failed.read_text())


def test_a_suspension_before_the_last_beat_is_none_of_the_hang(tmp_path):
    process = started(tmp_path, "suspended_before_its_last_beat")
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(3.5)
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == HUNG
    assert re.search(rf"{HANG} [5-7] s; all", RankFiles(tmp_path, 3).failed.read_text())


def test_a_failure_leaves_the_state_as_it_was_in_the_end(tmp_path):
    seen = [464]
    dog = Watchdog(RankFiles(tmp_path, 0), 2, lambda: (seen[0] // 16, seen[0]))
    dog.start(60)
    dog.beat("a training step", 60)
    end = time.monotonic() + 20
    while (last := state_of(RankFiles(tmp_path, 0))) is None or last.doing != "a training step":
        assert time.monotonic() < end
        time.sleep(0.02)
    seen[0] = 480  # the step is over, and its callbacks have not come to an end
    dog.stop(well=False)
    state = state_of(RankFiles(tmp_path, 0))
    assert (state.step, state.images_seen, state.doing, state.world) == (30, 480, "a training step", 2)
    assert abs(state.at - time.time()) < 10


def test_a_state_that_cannot_be_written_is_told_once_and_the_watch_goes_on(tmp_path, capfd):
    files = RankFiles(tmp_path, 0)
    files.state.mkdir()
    dog = Watchdog(files, 1, lambda: (1, 16))
    for doing in ("a training step", "an evaluation", "the end"):
        dog.beat(doing, 60)
        dog._tell_state()  # as once a second
    assert capfd.readouterr().err.count("state-rank-0.json cannot be written") == 1
    files.state.rmdir()
    dog.beat("a training step", 60)
    dog._tell_state()
    assert state_of(files).doing == "a training step"


def test_a_state_is_written_over_the_one_before_at_once(tmp_path):
    """Whoever reads meanwhile sees one of both; so does who reads after its process was killed."""
    files, ended = RankFiles(tmp_path, 0), threading.Event()
    states = [State(0, 1, "here", 1, "a step" * (1 + i % 9), 10**i, 16 * 10**i, 0.0) for i in range(12)]

    def write():
        for state in itertools.cycle(states):
            write_state(files, state)
            if ended.is_set():
                return

    write_state(files, states[0])
    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(state_of(files) in states for _ in range(3000))
    finally:
        ended.set()
        writer.join()


def test_half_a_state_is_none(tmp_path):
    files = RankFiles(tmp_path, 0)
    assert state_of(files) is None
    whole = State(0, 1, "here", 1, "a step", 2, 32, 0.0)
    for count in range(len(whole.json())):
        files.state.write_text(whole.json()[:count])
        assert state_of(files) is None
    files.state.write_text(json.dumps({"rank": 0}))
    assert state_of(files) is None
    files.state.write_text(whole.json())
    assert state_of(files) == whole
