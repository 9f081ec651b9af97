"""A run that is killed with SIGKILL again and again, against one that was left alone.

    python tests/killed_runs.py [--kills 10] [--seed 0] [--ranks 1,2,4] [--strategy zero3] [--folder F]

Kills come at random steps and after random fractions of a second, in turns of the whole tree of processes and of one of
its ranks; each start has the next number of ranks. Prints a table in Markdown and how far weights, averages and moments
are from those of the run that was left alone. With one number of ranks (--ranks 2) they must be bitwise equal. With
several they may differ by summation order: by SLACK times what it does to runs that are left alone, one on each number
of ranks. Exit code 1 if they differ by more, or if the samples do.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conftest import SMALL, command, finish
from ledgers import lines, tree, until

from diffusion_trainer.training.checkpoints import Checkpoint, latest

STEPS, BATCH = 64, 16
# A run that changes its ranks is rounded as often as one that does not, and by as much: what is left is luck, of the
# largest of 200 thousand differences, each the end of a walk. Seen: 0.6 to 1.1 times. (The last four steps alone change
# the weights by 100 times what is allowed, the moments by 10,000 times.)
SLACK = 10
RUN = [
    "train", "experiment=digits", *SMALL, f"num_images={STEPS * BATCH}", "optimizer.lr=0.01",
    "callbacks.evaluate.at_start=false", f"callbacks.evaluate.every_n_images={32 * BATCH}",
    f"callbacks.checkpoint.every_n_images={4 * BATCH}",
    "allowed_targets=[spies]", "+callbacks.ledger._target_=spies.Ledger", "ema=several",
]  # fmt: skip


@dataclass
class Report:
    rows: list[tuple] = field(default_factory=list)
    ledger_equal: bool = False
    missing: int = 0
    difference: dict[str, float] = field(default_factory=dict)  # by kind, the largest of any parameter
    allowed: dict[str, float] = field(default_factory=dict)  # 0: bitwise
    largest: dict[str, float] = field(default_factory=dict)  # of the run that was left alone

    def same(self) -> bool:
        return self.ledger_equal and all(self.difference[kind] <= self.allowed[kind] for kind in self.allowed)

    def table(self) -> str:
        head = ["| start | ranks | resumed from | killed | at images | lost |", "|---|---|---|---|---|---|"]
        return "\n".join([*head, *("| " + " | ".join(map(str, row)) + " |" for row in self.rows)])


def killed(folder: Path, name: str, *, strategy: str, ranks: Sequence[int], kills: int, seed: int) -> Report:
    """All runs, in folder/runs; shards of the digits must be there."""
    choose, report, run = random.Random(seed), Report(), folder / "runs" / name
    left_alone = {count: folder / "runs" / f"{name}-alone-{count}" for count in ranks}
    for count, path in left_alone.items():
        _to_the_end(folder, path.name, strategy, count)
    marks = sorted(choose.sample(range(1, STEPS), kills))
    for i in range(kills + 1):
        start, count = _newest(run), ranks[i % len(ranks)]
        if i == kills:
            _to_the_end(folder, name, strategy, count)
            report.rows.append((i + 1, count, start, "no", STEPS * BATCH, 0))
            break
        process = _begin(folder, name, strategy, count)
        until(run, max(start, marks[i] * BATCH - BATCH), process)
        time.sleep(choose.uniform(0, 0.3))
        victims = tree(process.pid)
        ranks_alone = i % 3 == 2 and count > 1
        for pid in [choose.choice(victims[1:])] if ranks_alone else victims:
            _kill(pid)
        finish(process)
        at = max(number for number, _ in lines(run)) + 1
        report.rows.append((i + 1, count, start, "one process" if ranks_alone else "all", at, at - _newest(run)))
    _compare(report, run, *left_alone.values())
    return report


def _begin(folder: Path, name: str, strategy: str, count: int):
    one = strategy if count > 1 or strategy.startswith("zero") else "single"
    return command(*RUN, f"name={name}", f"strategy={one}", f"trainer.processes={count}", cwd=folder)


def _to_the_end(folder: Path, name: str, strategy: str, count: int) -> None:
    code, output = finish(_begin(folder, name, strategy, count))
    assert code == 0, output


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself, or with its parent


def _newest(run: Path) -> int:
    found = latest(run / "checkpoints")
    return Checkpoint(found).images_seen if found else 0


def _compare(report: Report, run: Path, alone: Path, *others: Path) -> None:
    whole, seen = dict(lines(alone)), lines(run)
    report.missing = len(set(whole) - {number for number, _ in seen})
    report.ledger_equal = set(seen) == set(whole.items())
    report.difference = _differences(run, alone)
    orders = [_differences(other, alone) for other in others]
    report.allowed = {kind: SLACK * max((order[kind] for order in orders), default=0) for kind in report.difference}
    report.largest = {kind: _largest(_end(alone).whole(kind)) for kind in report.difference}


def _differences(run: Path, alone: Path) -> dict[str, float]:
    """By kind, gathered, the largest of any parameter."""
    ours, theirs = _end(run), _end(alone)
    for key in ("images_seen", "optimizer_steps", "parameters"):
        assert ours.manifest[key] == theirs.manifest[key]
    assert ours.kinds == theirs.kinds
    found = {}
    for kind in sorted(ours.kinds):
        a, b = ours.whole(kind), theirs.whole(kind)
        assert a.keys() == b.keys()
        found[kind] = _largest({name: a[name] - b[name] for name in b})
    return found


def _end(run: Path) -> Checkpoint:
    return Checkpoint(latest(run / "checkpoints"))


def _largest(tensors: Mapping[str, torch.Tensor]) -> float:
    """NaN if there is one."""
    return float(torch.stack([tensor.abs().max() for tensor in tensors.values()]).max())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--strategy", default="zero3")
    parser.add_argument("--shards", type=Path, default=Path("shards/digits"), help="that data/digits.py has written")
    parser.add_argument("--folder", type=Path, help="to work in; a temporary one that is removed by default")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        (folder / "shards" / "digits").symlink_to(options.shards.resolve())
        ranks = [int(n) for n in options.ranks.split(",")]
        report = killed(
            folder, "killed", strategy=options.strategy, ranks=ranks, kills=options.kills, seed=options.seed
        )
    print(report.table())
    print(json.dumps({"ledger_equal": report.ledger_equal, "missing": report.missing, "same": report.same()}))
    for kind, difference in report.difference.items():
        print(f"{kind}: differs by {difference:.2e} of {report.largest[kind]:.2e}, allowed {report.allowed[kind]:.2e}")
    return 0 if report.same() else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
