"""A process whose libraries would abort it while Python is taken apart ends with the exit code of its work."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, os, sys, threading, time
from diffusion_trainer.apps.ending import run_to_the_end

class Fragile:
    def __del__(self, abort=os.abort):
        abort()

sys.kept = Fragile()

def work():
    atexit.register(print, "atexit ran")
    threading.Thread(target=lambda: (time.sleep(0.1), print("thread ended"))).start()
    print("worked")
    {last}

{end}
"""


def run(last, end="run_to_the_end(work)"):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(last=last, end=end)], capture_output=True, text=True, check=False
    )


def test_the_script_would_abort_otherwise():
    assert run("return 0", end="sys.exit(work())").returncode < 0


@pytest.mark.parametrize("code", [0, 2, 143])
def test_exit_code_output_threads_and_atexit_are_as_usual(code):
    ended = run(f"return {code}")
    assert ended.returncode == code, ended.stderr
    assert ended.stdout.splitlines() == ["worked", "thread ended", "atexit ran"]


def test_the_exit_code_survives_the_terminal():
    reader, writer = os.pipe()
    os.close(reader)  # whoever read has gone
    script = SCRIPT.format(last="return 143", end="run_to_the_end(work)").replace('print("worked")', "")
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    ended = subprocess.run([sys.executable, "-c", script], stdout=writer, env=buffered, check=False)
    os.close(writer)
    assert ended.returncode == 143


def test_an_exception_is_shown_without_secrets(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "canary-of-a-token")
    ended = run("raise RuntimeError('broken: ' + os.environ['MY_TOKEN'])")
    assert "RuntimeError: broken: ***" in ended.stderr


def test_an_exception_is_shown_and_is_exit_code_1():
    ended = run("raise RuntimeError('broken')")
    assert ended.returncode == 1
    assert "RuntimeError: broken" in ended.stderr
