"""Why a run ended, on one screen: from what its ranks have left in its folder, and how their processes ended.

`python -m diffusion_trainer.apps.post_mortem <folder>` shows it where no parent has seen the processes (SLURM).
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import format_exception_only, format_tb
from typing import TextIO

from diffusion_trainer.callbacks import attempts
from diffusion_trainer.callbacks.checkpointing import STOP_SIGNALS
from diffusion_trainer.callbacks.last_words import (
    HANG,
    STARVED,
    SUSPENDED,
    RankFiles,
    attempt_folder,
    state_of,
    unknown,
    write_failure,
)
from diffusion_trainer.callbacks.redaction import redacted
from diffusion_trainer.callbacks.watchdog import HUNG
from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.evaluation.writing import spared, whole

LOGS = "logs"  # folder of a run
FILE = "post-mortem.txt"  # in it
RANKS = 16  # shown
LINES = 20  # of a log
LOST_PEER = (  # in the last words of a rank that is not to blame: gloo's, NCCL's and the watchdog's
    "closed by peer", "reset by peer", "closed by remote peer", "remote process exit", "communicator was aborted",
    "Timed out waiting", "collective operation timeout", HANG,
)  # fmt: skip


@contextmanager
def recorded(logs: Path, rank: int, world: int) -> Iterator[None]:
    """What a rank fails with inside is written to its file, unless it is a mistake that the user can mend."""
    files = RankFiles(logs, rank)
    _begin(files, world)
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, PassingError):
            raise  # the arguments' mistake, after which nobody asks
        what = "".join(format_exception_only(error)).strip()
        stack = [] if isinstance(error, PassingError) else format_tb(error.__traceback__)
        try:
            if not files.failed.exists():  # a hang's words: this is but the end of the workers that it kills
                write_failure(files, state_of(files) or unknown(rank, world), what, stack)
        except OSError as unwritten:
            error.add_note(f"{files.failed} could not be written: {unwritten}")
        raise


def _begin(files: RankFiles, world: int) -> None:
    """Takes away what this rank has left in an earlier start; rank 0 also what no rank of this one can have written by
    now: stacks are opened only once the ranks have met.
    """
    logs, earlier = files.logs, [files.failed, files.state]
    if files.rank == 0:  # that start may have had more ranks
        earlier += [path for path in _left(logs) if _rank_of(path) >= world]
        _move(logs, [logs / FILE, *logs.glob("stacks-rank-*.txt")])
    for path in earlier:
        path.unlink(missing_ok=True)


def put_away(logs: Path) -> None:
    """What an earlier start has left, into the folder of its attempt: before any rank runs."""
    _move(logs, [logs / FILE, *logs.glob("stacks-rank-*.txt"), *logs.glob("failed-rank-*.txt")])
    for path in _left(logs):
        path.unlink(missing_ok=True)


def _move(logs: Path, files: Sequence[Path]) -> None:
    """Into the newest attempt's folder, whose they are; those that cannot be moved would be taken for this start's."""
    numbers = attempts.numbers(logs)
    for path in files:
        if path.exists() and numbers:
            with spared(f"{path.name} of the start before, in its attempt's folder,"):
                path.replace(attempt_folder(logs, numbers[-1]) / path.name)
        path.unlink(missing_ok=True)


def _left(logs: Path) -> list[Path]:
    return [*logs.glob("failed-rank-*.txt"), *logs.glob("state-rank-*.json")]


@dataclass(frozen=True)
class Blame:
    """The rank that ended a run, and how."""

    rank: int
    how: str


def culprit(logs: Path, codes: Mapping[int, int], world: int) -> Blame | None:
    """The others fail because they have lost it. None if nothing tells.

    codes: of the ranks that had ended before anybody asked them to. Of those who leave last words it is the one who did
    first, unless these are about the loss of a peer: then it is a rank that was suspended, or waited for its data for
    too long, as the others did for it, or one that left none (killed, or stopped still).
    """
    ended = {rank: code for rank, code in codes.items() if code}
    mistaken = [rank for rank, code in ended.items() if code == 2]
    killed = [rank for rank, code in ended.items() if code < 0 and -code != signal.SIGABRT]
    spoke = sorted(_failures(logs), key=lambda files: files.failed.stat().st_mtime_ns)
    words, silent, held_up = {files.rank: files.failed.read_text() for files in spoke}, [], []
    if spoke and any(sign in words[spoke[0].rank] for sign in LOST_PEER):
        silent = [rank for rank in range(world) if rank not in (*words, *ended)]
        hung = [rank for rank, said in words.items() if HANG in said]
        held_up = [rank for sign in (SUSPENDED, f"({STARVED})") for rank in hung if sign in words[rank]]
    rank = next(iter([*mistaken, *killed, *held_up, *silent, *words, *ended]), None)
    if rank is None:
        return None
    if rank in ended:
        return Blame(rank, ending(ended[rank]))
    if rank not in words:
        return Blame(rank, "was not heard of (stopped, or lost)")
    return Blame(rank, "hung" if HANG in words[rank] else "failed")


def _failures(logs: Path) -> list[RankFiles]:
    return [RankFiles(logs, _rank_of(path)) for path in sorted(logs.glob("failed-rank-*.txt"))]


def _rank_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def ending(code: int) -> str:
    """In words: an exit code, for a signal negative, or 128 more, as a shell has it."""
    number = -code if code < 0 else code - 128
    if number in STOP_SIGNALS:
        return f"was told to stop by {signal.Signals(number).name}"
    if number in set(signal.Signals):
        hint = " (perhaps the memory did not suffice)" if number == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(number).name}{hint}"
    return "hung" if code == HUNG else f"failed with exit code {code}"


def screen(
    folder: Path,
    blame: Blame | None,
    codes: Mapping[int, int],
    world: int,
    command: str = "",
    attempt: int | None = None,
    code: int = -signal.SIGKILL,
) -> str:
    """One screen. codes: as for `culprit`; command: of a shell, that started the run and goes on with it; attempt: the
    start that ended so, if that is known; code: how that start ended, where no rank can be blamed.
    """
    logs = folder / LOGS
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    who = f"no rank has left a word; it {ending(code)}"
    if blame:
        who = f"rank {blame.rank} of {world} {blame.how}; the others were stopped"
    rank = blame.rank if blame else None
    lines = [f"post-mortem of {folder}, {now}: {who}.", *_table(logs, rank, codes, world)]
    if rank is not None:
        lines += _last_words(RankFiles(logs, rank, attempt))
    kinds = ("failed-rank-*.txt", "stacks-rank-*.txt")
    if attempt is not None:
        kinds = (f"{attempt_folder(logs, attempt).name}/rank-*.log", *kinds)
    left = [str(path.relative_to(logs)) for kind in kinds for path in sorted(logs.glob(kind))[:RANKS]]
    return "\n".join([*lines, f"files in {logs}: {', '.join(left) or 'none'}", *_resume(folder, command)])


def _table(logs: Path, blamed: int | None, codes: Mapping[int, int], world: int) -> list[str]:
    lines, now = [f"  {'rank':>4}  {'host':<12} {'step':>9} {'images':>12}  how it ended; what it was at"], time.time()
    for rank in range(min(world, RANKS)):
        state, mark = state_of(RankFiles(logs, rank)), "*" if rank == blamed else " "
        how = f"{ending(codes[rank])}; " if codes.get(rank) else ""
        if state is None:
            lines.append(f"{mark} {rank:>4}  {'?':<12} {'?':>9} {'?':>12}  {how}the start")
        else:
            numbers = f"{state.host[:12]:<12} {state.step:>9,} {state.images_seen:>12,}"
            lines.append(f"{mark} {rank:>4}  {numbers}  {how}{state.doing}, {max(0, now - state.at):.0f} s ago")
    return lines + ([f"  and {world - RANKS} more"] if world > RANKS else [])


def _last_words(files: RankFiles) -> list[str]:
    if files.failed.is_file():
        return [files.failed.read_text().rstrip()]
    if files.attempt is not None and files.log.is_file():
        return [f"the end of {files.log}:", *files.log.read_text(errors="replace").splitlines()[-LINES:]]
    return []


def _resume(folder: Path, command: str) -> list[str]:
    latest = folder / "checkpoints" / "latest"
    shown = f":\n  {command}" if command else ""
    if not latest.is_file():
        return [f"There is no checkpoint yet: the same command begins anew{shown}"]
    return [f"The newest checkpoint, {latest.read_text()}, stands: run the same command again to resume from it{shown}"]


def tell(folder: Path, text: str, file: TextIO) -> None:
    """The screen, without secrets, and <folder>/logs/post-mortem.txt where that can be written."""
    text = redacted(text)
    print(text, file=file)
    try:
        with whole(folder / LOGS / FILE) as part:
            part.write_text(text + "\n")
    except OSError as error:
        print(f"{folder / LOGS / FILE} could not be written: {error}", file=file)


def _now(logs: Path) -> float:
    """By the clock that the files there get their times from: a file server's, which may differ from this node's."""
    probe = logs / f".now-{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # a full disk
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def main() -> None:
    """Nothing if no rank has left a file: the run did not fail. How many ranks there were is in what they have left.
    A job script may give the exit code of the run as well, the command that goes on with it, and how many seconds ago
    this start began: what is older is of another one.
    """
    folder, given = Path(sys.argv[1]), sys.argv[2:]
    logs = folder / LOGS
    if given[2:]:
        began = _now(logs) - int(given[2]) - 1  # whole seconds
        _move(logs, [path for path in _left(logs) if path.stat().st_mtime < began])
    ranks = {_rank_of(path) for path in _left(logs)}
    states = [state for rank in ranks if (state := state_of(RankFiles(logs, rank)))]
    world = max([1, *(state.world for state in states), *(rank + 1 for rank in ranks)])
    attempt = max((state.attempt for state in states if state.attempt is not None), default=None)
    if ranks:
        code = int(given[0]) if given else -signal.SIGKILL
        again = given[1] if given[1:] else ""
        text = screen(folder, culprit(logs, {}, world), {}, world, again, attempt, code)
        tell(folder, text, sys.stdout)


if __name__ == "__main__":
    main()
