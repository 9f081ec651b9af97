"""launch/train.sbatch is sent TERM, with stand-ins for SLURM's commands (test_faults.py: by a real time limit)."""

import signal
import subprocess
import time

import pytest
from launching import SCRIPT, cluster, requeued  # noqa: F401 (fixtures)


@pytest.fixture
def told(cluster, tmp_path):  # noqa: F811
    """told(reason) -> the job's script, sent TERM while srun waits for a file `go`; SLURM's Reason is that."""
    tools, started = tmp_path / "tools", []

    def told(reason: str) -> subprocess.Popen:
        path = tools / "scontrol"
        path.write_text(path.read_text().replace("JobState=RUNNING", f"JobState=RUNNING Reason={reason}"))
        wait = f"cd {tmp_path}; touch began; until [ -e go ]; do sleep 0.05; done; exit 137"
        (tools / "srun").write_text(f"#!/bin/bash\n{wait}\n")
        started.append(subprocess.Popen(["bash", SCRIPT], env=cluster, stderr=subprocess.PIPE, text=True))
        until((tmp_path / "began").exists)
        started[0].send_signal(signal.SIGTERM)
        return started[0]

    yield told
    (tmp_path / "go").touch()
    for process in started:
        process.kill()
        process.communicate()


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_at_the_limit_the_job_is_requeued_while_its_ranks_still_live_and_once(told, requeued, tmp_path):  # noqa: F811
    script = told("TimeLimit")
    until(requeued)
    assert not (tmp_path / "go").exists()
    assert script.poll() is None
    (tmp_path / "go").touch()
    assert "time limit: back into the queue, to resume from checkpoint none" in script.communicate(timeout=20)[1]
    assert (script.returncode, requeued()) == (137, 1)


def test_another_term_is_waited_through(told, requeued, tmp_path):  # noqa: F811
    """The ranks' own exit code counts, not that of a `wait` that was interrupted."""
    script = told("None")
    time.sleep(0.5)
    assert (script.poll(), requeued()) == (None, 0)
    (tmp_path / "go").touch()
    assert "exit code 137: back into the queue" in script.communicate(timeout=20)[1]
    assert (script.returncode, requeued()) == (137, 1)
