"""Runs that hang, break, or are killed end by themselves and say on one screen why; those told to stop lose nothing."""

import json
import os
import re
import signal
import time

import psutil
import pytest
from conftest import SMALL, command, finish
from ledgers import lines, until
from spied_runs import SPY, bitwise, spied, spied_once

from diffusion_trainer.apps import post_mortem
from diffusion_trainer.callbacks.watchdog import HUNG
from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.slow
TIMEOUT = 6
RUN = [
    "train", "experiment=digits", *SMALL, "num_images=160000", "callbacks.evaluate=null", "strategy=ddp",
    "callbacks.checkpoint.every_n_images=160", "data.num_workers=1", "allowed_targets=[spies]",
    "+callbacks.ledger._target_=spies.Ledger", f"callbacks.heartbeat.hang_timeout_seconds={TIMEOUT}",
]  # fmt: skip


@pytest.fixture
def run(workplace):
    """A run of two ranks that has trained on some batches; its process and its folder."""
    process = command(*RUN, cwd=workplace)
    folder = workplace / "runs" / "digits"
    until(folder, 960, process)  # for some seconds: each second a rank writes down how far it is
    yield process, folder
    if process.poll() is None:
        process.kill()
        process.communicate()


def rank_of(process, number: int) -> psutil.Process:
    ranks = psutil.Process(process.pid).children()
    return next(p for p in ranks if p.environ().get("LOCAL_RANK") == str(number))


def ended(process) -> tuple[int, str, float]:
    """Exit code, output, and the seconds that it took; nothing that it had started is left."""
    family, begin = psutil.Process(process.pid).children(recursive=True), time.monotonic()
    code, output = finish(process)
    seconds = time.monotonic() - begin
    assert not psutil.wait_procs(family, timeout=10)[1]
    return code, output, seconds


def check_screen(output: str, folder, headline: str) -> str:
    """The post-mortem: one screen, the same in the file, with what a person asks first."""
    text = (folder / "logs" / post_mortem.FILE).read_text().strip()
    assert text in output
    assert headline in text.splitlines()[0]
    assert len(text.splitlines()) < 45
    assert "attempt-1/rank-0.log" in next(line for line in text.splitlines() if line.startswith("files in "))
    newest = latest(folder / "checkpoints").name
    assert f"The newest checkpoint, {newest}, stands: run the same command again to resume from it" in text
    assert text.splitlines()[-1].startswith("  diffusion-trainer train experiment=digits ")
    rows = [line.lstrip("* ").split() for line in text.splitlines()[2:4]]
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(int(row[3].replace(",", "")) == 16 * int(row[2].replace(",", "")) > 0 for row in rows)
    return text


@pytest.mark.parametrize("number", [0, 1])
def test_a_stopped_rank_is_noticed_by_its_peer_which_names_the_collective(run, number):
    process, folder = run
    rank_of(process, number).suspend()
    code, output, seconds = ended(process)
    assert code == HUNG, output
    assert TIMEOUT - 1 < seconds < TIMEOUT + 10
    check_screen(output, folder, f"rank {number} of 2 was not heard of (stopped, or lost)")
    peer = (folder / "logs" / f"stacks-rank-{1 - number}.txt").read_text()
    assert "hung: no progress for" in peer
    assert re.search(r" in \w*(all_reduce|all_gather|broadcast|_engine_run_backward)", peer), peer
    assert "worker process" in peer
    assert "in _worker_loop" in peer  # of its worker, which was asked


def test_a_stopped_worker_is_noticed_by_its_rank_and_killed(run):
    process, folder = run
    (worker,) = rank_of(process, 1).children()
    worker.suspend()
    code, output, seconds = ended(process)
    assert code == HUNG, output
    assert seconds < TIMEOUT + 10
    text = check_screen(output, folder, "rank 1 of 2 hung")
    assert "images (waiting for data):" in text
    stacks = (folder / "logs" / "stacks-rank-1.txt").read_text()
    assert f"worker process {worker.pid}: T (stopped)" in stacks
    assert "in next" in stacks


def test_one_that_hangs_before_the_first_step_is_noticed_and_its_peers_leave_their_stacks(workplace):
    """They have start_timeout_seconds, and are told to end before."""
    code, output = finish(command(*RUN, "+callbacks.stuck._target_=spies.Stuck", cwd=workplace))
    assert code == HUNG, output
    logs = workplace / "runs" / "digits" / "logs"
    assert "rank 1 of 2 hung" in (logs / post_mortem.FILE).read_text()
    assert "hung: no progress for" in (logs / "stacks-rank-1.txt").read_text()
    peer = (logs / "stacks-rank-0.txt").read_text()
    assert "no sign of life in the" in peer
    assert "in on_train_batch_start" in peer
    assert "in _worker_loop" in peer


def test_a_killed_rank_is_named(run):
    process, folder = run
    rank_of(process, 0).kill()
    code, output, seconds = ended(process)
    assert code == 1, output
    assert seconds < 15
    check_screen(output, folder, "rank 0 of 2 was killed by SIGKILL (perhaps the memory did not suffice)")


def test_an_exception_is_told_with_its_stack_and_not_that_of_the_peer_which_lost_it(workplace):
    code, output = finish(command(
        *RUN, "+callbacks.trap._target_=spies.Trap", "+callbacks.trap.at=496", "+callbacks.trap.rank=1", cwd=workplace,
    ))  # fmt: skip
    assert code == 1, output
    text = check_screen(output, workplace / "runs" / "digits", "rank 1 of 2 failed with exit code 1")
    assert "at step 31, 496 images (a training step):\nRuntimeError: the trap at 496\n" in text
    assert "in after_step" in text


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_bitwise(folder, number):
    name, arguments = f"one-{number.name}", ["strategy=ddp", "num_images=640"]
    whole = spied_once(folder, "whole", *arguments)
    process = command("train", *SPY, *arguments, f"name={name}", cwd=folder)
    begun = folder / "runs" / name / "metrics.csv"
    while not begun.is_file() or "\n64," not in begun.read_text():
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
    rank_of(process, 1).send_signal(number)
    code, output = finish(process)
    assert code == 128 + number, output
    stopped = Checkpoint(latest(folder / "runs" / name / "checkpoints")).images_seen
    assert 64 <= stopped < 640
    assert f"stopped at {stopped:,} images" in output
    assert bitwise(spied(folder, name, *arguments, started=stopped), whole)


def test_a_signal_to_the_parent_reaches_the_ranks(run):
    process, folder = run
    process.send_signal(signal.SIGUSR1)
    code, output, _ = ended(process)
    assert code == 128 + signal.SIGUSR1, output
    assert "stopped at" in output
    assert not (folder / "logs" / post_mortem.FILE).exists()
    assert not list((folder / "logs").glob("state-rank-*"))
    assert not list((folder / "logs").glob("stacks-rank-*"))


def test_a_terminal_that_goes_stops_a_run_in_order_and_its_words_are_in_the_log(run):
    process, folder = run
    process.stdout.close()  # nobody reads what it prints from here on
    for _ in range(4):  # the kernel and a shell send it both
        process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=100) == 128 + signal.SIGHUP
    words = (folder / "logs" / "attempt-1" / "rank-0.log").read_text()
    stopped = Checkpoint(latest(folder / "checkpoints")).images_seen
    assert f"stopped at {stopped:,} images" in words
    assert stopped >= 320
    assert not (folder / "logs" / post_mortem.FILE).exists()


def test_nohup_lets_a_run_outlive_its_terminal(workplace):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = command(*RUN, cwd=workplace)
    signal.signal(signal.SIGHUP, before)
    folder = workplace / "runs" / "digits"
    until(folder, 160, process)
    for p in (process, rank_of(process, 1)):
        p.send_signal(signal.SIGHUP)
    until(folder, 480, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM


def test_a_signal_to_one_rank_before_it_trains_is_the_end_and_no_failure(workplace):
    process = command(*RUN, cwd=workplace)
    end = time.monotonic() + 100
    while not any(p.environ().get("LOCAL_RANK") == "1" for p in psutil.Process(process.pid).children()):
        assert time.monotonic() < end
        time.sleep(0.02)
    rank_of(process, 1).send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == 128 + signal.SIGUSR1, output
    assert "rank 1 was told to stop before it had anything to save" in output
    assert "post-mortem" not in output


def test_a_stop_file_stops_once(run):
    process, folder = run
    (folder / "stop").touch()
    code, output, _ = ended(process)
    assert code == 128 + signal.SIGTERM, output
    assert "stopped at" in output
    assert not (folder / "stop").exists()


def test_a_stack_is_had_for_the_asking_and_training_goes_on(run):
    process, folder = run
    rank_of(process, 1).send_signal(signal.SIGQUIT)
    until(folder, max(number for number, _ in lines(folder)) + 320, process)
    assert "Current thread" in (folder / "logs" / "stacks-rank-1.txt").read_text()
    state = json.loads((folder / "logs" / "state-rank-1.json").read_text())
    assert state["pid"] == rank_of(process, 1).pid
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM
