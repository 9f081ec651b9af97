"""The stacks of a process that is asked for them, or that gives SIGTERM no answer; it goes on."""

import signal
import time

import psutil
import pytest
from watched import ended, started

from diffusion_trainer.callbacks.last_words import RankFiles

pytestmark = pytest.mark.slow


def test_one_that_gives_sigterm_no_answer_is_left_alone_with_its_stacks(tmp_path):
    """Its main thread never comes back to Python, which would call the handler."""
    stacks = RankFiles(tmp_path, 3).stacks
    process = started(tmp_path, "deaf")
    worker = int(process.stdout.readline())
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.5)  # a beat just before the signal may be the answer to it
    try:
        for _ in range(2):  # the second has no more of them
            process.terminate()
            end = time.monotonic() + 20
            while "in sleeping_in_python" not in stacks.read_text():  # of its worker, which is asked last
                assert time.monotonic() < end
                time.sleep(0.02)
        time.sleep(3)
        text = stacks.read_text()
        assert text.count("since SIGTERM") == 1
        assert "rank 3 of 4 on " in text
        assert " s since SIGTERM\n  worker process" in text
        assert "in deaf" in text
        assert process.poll() is None
        assert psutil.pid_exists(worker)
        assert not RankFiles(tmp_path, 3).failed.exists()
    finally:
        psutil.Process(worker).kill()
        process.kill()
        process.communicate()


@pytest.mark.parametrize("asked", [False, True])
def test_stacks_of_one_that_was_slow_to_answer_are_taken_back_and_those_that_were_asked_for_are_not(tmp_path, asked):
    """And a process that was not forked, which SIGQUIT would end, goes on."""
    done, stacks = ended(tmp_path, "stopping_in_order", *["asked"] * asked)
    assert (done.returncode, done.stdout) == (0, "True True\nwent on\n"), done.stderr
    assert "SIGTERM" not in stacks
    assert ("in stopping_in_order" in stacks) == asked
    assert list(tmp_path.iterdir()) == ([RankFiles(tmp_path, 3).stacks] if asked else [])


def test_stacks_are_had_for_the_asking_where_python_runs_no_more(tmp_path):
    process = started(tmp_path, "deaf")
    worker, stacks = int(process.stdout.readline()), RankFiles(tmp_path, 3).stacks
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGQUIT)
        end = time.monotonic() + 20
        while "in sleeping_in_python" not in (text := stacks.read_text()):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert text.count("asked for by SIGQUIT\n  worker process") == 1
        assert "in _watch" in text
        assert process.poll() is None
        assert psutil.pid_exists(worker)
    finally:
        psutil.Process(worker).kill()
        process.kill()
        process.communicate()


def test_a_call_outside_python_goes_on_when_stacks_are_asked_for(tmp_path):
    process = started(tmp_path, "reading")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGQUIT)
    assert process.communicate(timeout=20)[0] == "1\nwent on\n"
    assert "in reading" in RankFiles(tmp_path, 3).stacks.read_text()
