"""A process that makes no progress ends by itself, whatever holds it; one that does is left alone."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from diffusion_trainer.callbacks.heartbeat import Heartbeat
from diffusion_trainer.callbacks.last_words import HANG, SUSPENDED, RankFiles, State, state_of
from diffusion_trainer.callbacks.watchdog import HUNG, Watchdog

pytestmark = pytest.mark.slow

SCRIPT = """
import ctypes, multiprocessing, os, signal, sys, threading, time
from pathlib import Path
from diffusion_trainer.callbacks import watchdog
from diffusion_trainer.callbacks.last_words import RankFiles
from diffusion_trainer.streaming import loader

watchdog.LINGER_SECONDS, watchdog.LOCKED_SECONDS, watchdog.ANSWER_SECONDS = 0.3, 0.5, 0.5
dog = watchdog.Watchdog(RankFiles(Path(sys.argv[1]), 3), 4, lambda: (10, 160))

def soon():
    dog.beat("a step", 0.4)

def sleeping_in_python(then=soon):
    then()
    time.sleep(100)

def worker():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=sleeping_in_python, args=(ready.set,))
    worker.start()
    ready.wait()
    print(worker.pid, flush=True)
    return worker

def waiting_for_a_worker():
    sleeper = worker()
    soon()
    sleeper.join()

def waiting_for_a_stopped_worker():
    sleeper = worker()
    os.kill(sleeper.pid, signal.SIGSTOP)
    os.waitpid(sleeper.pid, os.WUNTRACED)
    soon()
    sleeper.join()

def deaf():
    worker()
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    dog.beat("a step", 100)
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)  # which no signal interrupts

def answering():
    signal.signal(signal.SIGTERM, lambda number, frame: dog.beat("a save", 100))
    signal.raise_signal(signal.SIGTERM)
    time.sleep(3)

def asleep_while_a_worker_is_told():
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    dog.beat("a step", 100)
    sleeper = multiprocessing.get_context("fork").Process(target=told)
    sleeper.start()
    sleeper.join()
    time.sleep(3)

def stopping_in_order():
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    if sys.argv[3:]:
        signal.raise_signal(signal.SIGQUIT)
    spawned = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(100,))
    spawned.start()
    time.sleep(1.5)
    signal.raise_signal(signal.SIGTERM)
    time.sleep(3)
    print("since SIGTERM" in dog.files.stacks.read_text(), spawned.is_alive())
    spawned.kill()

def reading():
    dog.beat("a step", 100)
    here, there = os.pipe()
    threading.Timer(2, os.write, (there, b"x")).start()
    print("ready", flush=True)
    print(ctypes.CDLL(None).read(here, ctypes.create_string_buffer(1), 1))

def suspended_before_its_last_beat():
    before = now = time.monotonic()
    print("ready", flush=True)
    while now - before < 2:
        before, now = now, time.monotonic()
        dog.beat("a step", 5)
    time.sleep(100)

def told():
    loader._outlive_a_stop(0)
    signal.raise_signal(signal.SIGTERM)

def waiting():
    dog.beat("a step", 5)
    print("ready", flush=True)
    time.sleep(100)

def holding_the_lock_of_python():
    library = ctypes.PyDLL(None)
    dog.start(2.0)
    library.sleep(100)

def beating():
    for i in range(15):
        dog.beat("a step", 1.0)
        time.sleep(0.1)

if sys.argv[2] != "holding_the_lock_of_python":
    dog.start(30)
globals()[sys.argv[2]]()
dog.stop(well=True)
print("went on")
"""


def ended(folder, *what: str) -> tuple[subprocess.CompletedProcess, str]:
    """The process and its stacks."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *what], capture_output=True, text=True, check=False, timeout=60
    )
    assert time.monotonic() - begin < 30
    stacks = RankFiles(folder, 3).stacks
    return done, stacks.read_text() if stacks.is_file() else ""


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


def test_one_that_gives_sigterm_no_answer_is_left_alone_with_its_stacks(tmp_path):
    """Its main thread never comes back to Python, which would call the handler."""
    stacks = RankFiles(tmp_path, 3).stacks
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "deaf"], stdout=subprocess.PIPE, text=True)
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


@pytest.mark.parametrize("what", ["beating", "answering", "asleep_while_a_worker_is_told"])
def test_one_that_beats_goes_on_and_leaves_nothing(tmp_path, what):
    done, _ = ended(tmp_path, what)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", [False, True])
def test_stacks_of_one_that_was_slow_to_answer_are_taken_back_and_those_that_were_asked_for_are_not(tmp_path, asked):
    """And a process that was not forked, which SIGQUIT would end, goes on."""
    done, stacks = ended(tmp_path, "stopping_in_order", *["asked"] * asked)
    assert (done.returncode, done.stdout) == (0, "True True\nwent on\n"), done.stderr
    assert "SIGTERM" not in stacks
    assert ("in stopping_in_order" in stacks) == asked
    assert list(tmp_path.iterdir()) == ([RankFiles(tmp_path, 3).stacks] if asked else [])


def asleep(pid: int) -> bool:
    """Whether each thread of a process waits for something other than a processor or a disk."""
    return all("State:\tS" in (task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir())


def test_stacks_are_had_for_the_asking_where_python_runs_no_more(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "deaf"], stdout=subprocess.PIPE, text=True)
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
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "reading"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGQUIT)
    assert process.communicate(timeout=20)[0] == b"1\nwent on\n"
    assert "in reading" in RankFiles(tmp_path, 3).stacks.read_text()


def test_one_that_was_suspended_says_so(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "waiting"], stdout=subprocess.PIPE)
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
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "suspended_before_its_last_beat"], stdout=subprocess.PIPE
    )
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


@pytest.mark.parametrize("seconds", [(0, 10), (-1, 10), (10, 9), (10, float("inf")), (float("nan"), 10)])
def test_time_outs_that_make_no_sense_are_refused(seconds):
    with pytest.raises(ValueError, match="must be positive and at most start_timeout_seconds"):
        Heartbeat(*seconds)


class Module(torch.nn.Module):
    """What a Heartbeat knows of a DiffusionModule and a Trainer."""

    def __init__(self, folder):
        super().__init__()
        self.model, self.images_seen, self.progress = torch.nn.Linear(1, 1), 32, type("P", (), {"batch_size": 16})
        self.default_root_dir, self.global_rank, self.world_size, self.accumulate_grad_batches = folder, 0, 1, 2


@pytest.fixture
def beats(tmp_path, monkeypatch):
    """A heartbeat that stands in its callback's place; what it tells its watchdog."""
    heartbeat, module, told = Heartbeat(10, 20), Module(tmp_path), []
    beat = Watchdog.beat
    monkeypatch.setattr(Watchdog, "beat", lambda *args: beat(*args) or told.append(args[1:]))
    heartbeat.setup(module, module, "fit")
    yield heartbeat, module, told
    heartbeat.teardown(module, module, "fit")
    heartbeat.on_exception(module, module, RuntimeError())  # after it, or before `setup`: of no effect
    assert not module.model._forward_pre_hooks


def test_each_call_of_the_model_is_a_beat_and_says_what_for(beats):
    _, module, told = beats
    module.model(torch.ones(1, 1))
    module.eval()
    module.model(torch.ones(1, 1))
    assert told == [("the start", 20), ("a training step", 20), ("an evaluation", 20)]


def test_the_time_for_the_start_is_over_with_the_first_step(beats):
    heartbeat, module, told = beats
    heartbeat.on_train_batch_end(module, module, None, None, 0)  # the first of two micro-batches
    heartbeat.on_train_batch_end(module, module, None, None, 1)
    heartbeat.on_train_batch_start(module, module, None, 2)
    assert told[1:] == [("waiting for data", 20), ("waiting for data", 10), ("a training step", 10)]


def test_the_first_batch_is_waited_for_no_longer_than_any_other(beats):
    heartbeat, module, told = beats
    heartbeat.run = type("Run", (), {})()
    heartbeat.start()
    heartbeat.on_train_batch_start(module, module, None, 0)
    assert told[1:] == [("waiting for data", 10), ("a training step", 20)]


def test_a_callback_may_ask_for_more_time_but_not_for_less(beats):
    heartbeat, module, told = beats
    heartbeat.run = type("Run", (), {})()
    heartbeat.start()
    heartbeat.on_train_batch_end(module, module, None, None, 1)
    heartbeat.run.beat("the wait for a checkpoint", 3600)
    heartbeat.run.beat("what follows a step", 1)
    assert told[3:] == [("the wait for a checkpoint", 3600), ("what follows a step", 10)]


def test_after_the_last_step_no_data_is_waited_for(beats):
    """Before any callback's on_train_end, where ranks may wait for each other; and behind the last of them."""
    heartbeat, module, told = beats
    heartbeat.on_train_batch_end(module, module, None, None, 1)
    heartbeat.on_train_epoch_end(module, module)
    assert told[-1] == ("the end", 20)
    heartbeat._of_the_model(module.model, ())
    heartbeat.on_train_end(module, module)
    assert told[-2:] == [("a training step", 10), ("the end", 20)]
