"""Which process this is, and how a run's processes are started on one machine.

Under srun or torchrun the processes exist already. Otherwise `spawn` starts one for each device with the variables that
torchrun would set, all from the one resolved configuration, and none outlives the parent.
"""

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from torch import distributed

from diffusion_trainer.apps import post_mortem
from diffusion_trainer.callbacks import attempts
from diffusion_trainer.callbacks.checkpointing import STOP_SIGNALS, signals_to_stop
from diffusion_trainer.callbacks.last_words import RankFiles
from diffusion_trainer.conventions import UserError, cores
from diffusion_trainer.training.agreement import Agreement

ROLLED_BACK = 75  # exit code (EX_TEMPFAIL of sysexits.h): to be started again, from an earlier checkpoint
STOPPED = (*(128 + s for s in STOP_SIGNALS), ROLLED_BACK)  # exit codes of a rank that ended in order
GRACE_SECONDS = 20  # between asking the other ranks to stop and killing them


@dataclass(frozen=True)
class World:
    """The processes of a run, as this process's environment tells."""

    rank: int
    size: int
    nodes: int
    slurm: bool

    @property
    def local_size(self) -> int:
        return self.size // self.nodes

    def environment(self) -> ClusterEnvironment:
        # Lightning's own requeue saves inside the signal handler and deadlocks: a later layer does it outside.
        return SLURMEnvironment(auto_requeue=False) if self.slurm else LightningEnvironment()


def current() -> World | None:
    """The world this process was started in; None when nobody has started one (then `spawn` does)."""
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", 0)) > 0 and "LOCAL_RANK" not in env:
        return World(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_STEP_NUM_NODES"]), True)
    if "LOCAL_RANK" in env:
        size = int(env.get("WORLD_SIZE", 1))
        local_size = int(env.get("LOCAL_WORLD_SIZE", size))
        rank = int(env.get("RANK", env["LOCAL_RANK"]))
        _check_rank(rank, local_size)
        return World(rank, size, max(1, size // local_size), False)
    return None


def _check_rank(rank: int, local_size: int) -> None:
    """Lightning counts ranks by nodes: two that both take themselves for rank 0 would wait for each other for ever."""
    node, local = LightningEnvironment().node_rank(), int(os.environ["LOCAL_RANK"])
    if rank != node * local_size + local:
        raise UserError(
            f"RANK={rank} LOCAL_RANK={local} contradict GROUP_RANK={node} (or NODE_RANK) and LOCAL_WORLD_SIZE="
            f"{local_size}, which make it rank {node * local_size + local}: set them all, as torchrun does"
        )


@contextmanager
def agreeing() -> Iterator[Agreement]:
    """The ranks that torchrun or srun has started, talking over gloo; this process alone where nobody has."""
    world = current()
    if world is None or world.size == 1:
        yield Agreement()
        return
    environment = world.environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank())
    address = f"tcp://{environment.main_address}:{environment.main_port}"
    distributed.init_process_group("gloo", init_method=address, rank=world.rank, world_size=world.size)
    try:
        yield Agreement()
    finally:
        distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _before_exec() -> None:
    # SIGINT waits until the rank says what it means (apps/start.py): no traceback of an interpreter that starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if sys.platform == "linux":  # a killed parent must not leave ranks behind: they get SIGTERM, save, and stop
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)


def _environment(count: int, attempt: int) -> dict[str, str]:
    """What the ranks of one world on this machine have in common."""
    threads = max(1, cores() // count)
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "NODE_RANK": "0",
        attempts.NUMBER: str(attempt),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def spawn(arguments: Sequence[str], count: int, logs: Path, inherited: Sequence[int] = ()) -> int:
    """Runs `count` processes `python <arguments>` as ranks of one world; returns the exit code of the run.

    Rank 0 writes to this terminal (and to its log: apps/rank.py), rank r to <logs>/attempt-<n>/rank-<r>.log, as does
    its traceback. Ctrl-C and the other signals to stop go to all ranks; a third one kills them; SIGHUP does not
    count, which a terminal that goes may send several times. When a rank fails, the others are asked to stop, then
    killed, and a post-mortem is printed and written to <logs>/post-mortem.txt. inherited: descriptors that the ranks
    keep open.
    """
    post_mortem.put_away(logs)
    attempt = attempts.begin(logs)
    shared = _environment(count, attempt)
    ranks: list[subprocess.Popen] = []
    received: list[int] = []

    def forward(number: int, frame) -> None:
        received.append(number)
        impatient = number != signal.SIGHUP and sum(n != signal.SIGHUP for n in received) >= 3
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if impatient else number)

    previous = {s: signal.signal(s, forward) for s in signals_to_stop()}
    try:
        for rank in range(count):
            ranks.append(_start(RankFiles(logs, rank, attempt), arguments, shared, inherited))
            if received:  # it came while this rank was being started
                ranks[-1].send_signal(received[-1])
        return _wait(ranks, logs, attempt, received)
    finally:
        _stop(ranks)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(
    files: RankFiles, arguments: Sequence[str], shared: Mapping[str, str], inherited: Sequence[int]
) -> subprocess.Popen:
    rank = files.rank
    with _opened(files) if rank else nullcontext() as log:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,  # the terminal's Ctrl-C reaches the parent alone, which passes it on once
            preexec_fn=_before_exec,
            pass_fds=inherited,
        )


def _opened(files: RankFiles) -> AbstractContextManager[IO | None]:
    """Its log; where that cannot be made what it prints comes to this terminal, as rank 0's does."""
    try:
        return files.log.open("w")
    except OSError as error:
        print(f"  WARNING: {files.log} cannot be written ({error.strerror}); it is printed here", flush=True)
        return nullcontext()


def _wait(ranks: Sequence[subprocess.Popen], logs: Path, attempt: int, received: Sequence[int]) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        failed = {rank: code for rank, code in enumerate(codes) if code}
        if failed:
            if received or all(code in STOPPED for code in failed.values()):
                _join(ranks)  # each of them is on its way out
            failed = {rank: code for rank, code in failed.items() if code not in STOPPED} or failed
            blame = post_mortem.culprit(logs, failed, len(ranks))  # before what the others do as they are stopped
            _stop(ranks)
            return 128 + received[0] if received else _report(ranks, failed, blame, logs, attempt)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _report(
    ranks: Sequence[subprocess.Popen], failed: Mapping[int, int], blame: post_mortem.Blame, logs: Path, attempt: int
) -> int:
    """The run's exit code; says what happened unless that was a clean stop, or a user's mistake that has been shown.

    failed: the exit codes of the ranks that had ended by themselves.
    """
    rank = blame.rank
    code = failed.get(rank, next(iter(failed.values())))
    if -code in STOP_SIGNALS:
        print(f"rank {rank} was told to stop before it had anything to save.", file=sys.stderr)
        return 128 - code
    log = RankFiles(logs, rank, attempt).log
    if code == 2 and rank and ranks[0].returncode != 2 and log.is_file():  # that only this rank could see
        print(log.read_text(errors="replace").strip(), file=sys.stderr)
    if code in (2, *STOPPED):
        return code
    command = shlex.join(["diffusion-trainer", *sys.argv[1:]])
    text = post_mortem.screen(logs.parent, blame, failed, len(ranks), command, attempt)
    post_mortem.tell(logs.parent, text, sys.stderr)
    return 1 if code < 0 else code


def _join(ranks: Sequence[subprocess.Popen]) -> None:
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end and any(process.poll() is None for process in ranks):
        time.sleep(0.05)


def _stop(ranks: Sequence[subprocess.Popen]) -> None:
    end = time.monotonic() + GRACE_SECONDS
    for process in ranks:
        if process.poll() is None:
            process.terminate()
            process.send_signal(signal.SIGCONT)  # one that is stopped could not end: it writes its stacks, too
    for process in ranks:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
