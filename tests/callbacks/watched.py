"""A process with a watchdog that does what its second argument names: `python watched.py FOLDER WHAT`; to start it."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from diffusion_trainer.callbacks import watchdog
from diffusion_trainer.callbacks.last_words import RankFiles
from diffusion_trainer.streaming import loader


def started(folder: Path, *what: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, str(folder), *what], stdout=subprocess.PIPE, text=True)


def ended(folder: Path, *what: str) -> tuple[subprocess.CompletedProcess, str]:
    """The process and its stacks."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *what], capture_output=True, text=True, check=False, timeout=60
    )
    assert time.monotonic() - begin < 30
    stacks = RankFiles(folder, 3).stacks
    return done, stacks.read_text() if stacks.is_file() else ""


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
    for _ in range(15):
        dog.beat("a step", 1.0)
        time.sleep(0.1)


if __name__ == "__main__":
    watchdog.LINGER_SECONDS, watchdog.LOCKED_SECONDS, watchdog.ANSWER_SECONDS = 0.3, 0.5, 0.5
    dog = watchdog.Watchdog(RankFiles(Path(sys.argv[1]), 3), 4, lambda: (10, 160))
    if sys.argv[2] != "holding_the_lock_of_python":
        dog.start(30)
    globals()[sys.argv[2]]()
    dog.stop(well=True)
    print("went on")
