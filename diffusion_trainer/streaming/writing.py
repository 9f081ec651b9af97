"""Runs a recipe: its processes, its one line of progress, and what its command line has in common with others."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.recipes import Job, Written

SAY_EVERY_SECONDS = 10  # where there is no terminal
SHOWN = 10  # of the items that were left out


def write(job: Job, processes: int, rank: int = 0, world: int = 1) -> dict | None:
    """The shards k with k % world == rank, by so many processes; what <name>.json says once all ranks are done.

    Says on stdout what was written. UserError where something has to be mended first.
    """
    if not job.begin():
        print(f"{job.folder} has all of {job.name} already")
        return job.end()
    mine = range(rank, job.recipe.num_shards, world)
    todo = [k for k in mine if Written.load(job.note(k)) is None]
    progress = Progress(len(mine), len(mine) - len(todo))
    try:
        for written in _written(job, todo, min(processes, len(todo))):
            progress(written)
    except KeyboardInterrupt:
        progress.end()
        print(f"interrupted; {progress.done} shards are done: the same command goes on from there", file=sys.stderr)
        raise
    progress.end()
    report = job.end()
    _tell(job, report, len(mine))
    return report


def _tell(job: Job, report: dict | None, mine: int) -> None:
    if report is None:
        print(f"{mine} shards are done; {job.name} appears in {job.folder} when those of all ranks are")
        return
    skipped = report["skipped"]
    print(f"{job.folder}: {report['samples']:,} samples in {report['shards']:,} shards, {report['bytes'] / 1e9:.3f} GB")
    for message in skipped[:SHOWN]:
        print(f"  left out: {message}", file=sys.stderr)
    if skipped:
        more = f"; all of them stand in {job.record}" if len(skipped) > SHOWN else ""
        print(f"{len(skipped):,} items were left out{more}", file=sys.stderr)


class Progress:
    """One line that is written again on a terminal; elsewhere a line now and then."""

    def __init__(self, shards: int, done: int):
        self.shards, self.done, self.samples = shards, done, 0
        self._terminal = sys.stderr.isatty()
        self._begin = self._said = time.monotonic()

    def __call__(self, written: Written) -> None:
        self.done += 1
        self.samples += written.shard.samples
        now = time.monotonic()
        if self._terminal or now - self._said >= SAY_EVERY_SECONDS:
            self._said = now
            rate = self.samples / (now - self._begin)
            line = f"  {self.done:,} of {self.shards:,} shards, {rate:,.0f} samples/s"
            print(f"\r{line:<60}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
            sys.stderr.flush()

    def end(self) -> None:
        if self._terminal and self.samples:
            print(file=sys.stderr)


def _written(job: Job, todo: Sequence[int], processes: int) -> Iterator[Written]:
    """Each shard when it is whole."""
    if processes <= 1:
        yield from map(job.write, todo)
        return
    bounds = [len(todo) * p // processes for p in range(processes + 1)]  # neighbours read the same parts of their input
    with _workers(job, [todo[a:b] for a, b in pairwise(bounds)]) as running:
        while running:
            for receiver in wait(list(running)):
                try:
                    message = receiver.recv()
                except EOFError:
                    _check_end(running.pop(receiver))
                    continue
                if isinstance(message, UserError):
                    raise message
                yield message


@contextmanager
def _workers(job: Job, parts: Sequence[Sequence[int]]) -> Iterator[dict[Connection, BaseProcess]]:
    """A process for each part; those that still run are ended with the block."""
    context = get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit: Ctrl-C is for the parent to answer
    try:
        for part in parts:
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(job, part, sender), daemon=True)
            worker.start()
            sender.close()
            workers[receiver] = worker
    finally:
        signal.signal(signal.SIGINT, before)
    started = list(workers.values())
    try:
        yield workers
    finally:
        for worker in started:
            worker.terminate()
            worker.join()


def _work(job: Job, todo: Sequence[int], sender: Connection) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        for k in todo:
            sender.send(job.write(k))
    except UserError as error:
        sender.send(error)


def end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _check_end(worker: BaseProcess) -> None:
    worker.join()
    if worker.exitcode:
        why = f"signal {-worker.exitcode} (out of memory?)" if worker.exitcode < 0 else "an error, see above"
        raise UserError(f"a process was ended by {why}; the shards that are done stand: run the same command again")


def positive(text: str) -> int:
    """For argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, not {text}")
    return int(text)


def arguments(description: str, samples_per_shard: int | None = None) -> argparse.ArgumentParser:
    """What every recipe asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--name", default="train", help="of the set: the shards are <out>/<name>-000000.tar and on")
    if samples_per_shard:
        parser.add_argument(
            "--samples-per-shard", type=positive, default=samples_per_shard, help="best are 64 to 256 MB a shard"
        )
    return parser


def script(main: Callable[[], None]) -> int:
    """The exit code; mistakes are told without a traceback."""
    try:
        main()
    except (UserError, OSError) as error:  # a disk is full, a folder is a file
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
