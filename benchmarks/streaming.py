"""Measures how fast samples come out of shards, against other ways to read the same samples.

    pip install -e '.[benchmark]'
    python benchmarks/streaming.py [--data FOLDER] [--rounds 7] [--seconds 4] [--only latents,jpeg] [--out F.json]

Two sets, made here (3 GB in all, in --data, which is kept, or in a temporary folder):

latents  4 x 32 x 32 float16 in an npy and a class, 65,536 samples, batch 256
jpeg     256 x 256 pictures (quality 90) and a class, 8,192 samples, batch 128; they come as uint8

Every run is a process of its own with 0, 1 or 2 workers. After 8 batches it measures up to an epoch, no longer than
--seconds: samples per second, and per second of CPU time of all its processes. In each round all have their turn, in
another order. A ratio is that of both in one round, each with the number of workers with which it is fastest, or (the
third column) has the most per CPU second. A contender that is not installed is left out. "limit" is simplejpeg alone on
pictures in memory, in 1 and 2 processes. "first" is the seconds from the call that opens the shards to the first batch,
imports done.
--profile: where the time of one of our processes goes.
"""

import argparse
import cProfile
import json
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from operator import itemgetter
from pathlib import Path
from random import Random
from statistics import quantiles
from subprocess import run as run_process
from typing import Any

import numpy as np
import simplejpeg
from streaming_contenders import CONTENDERS, SETS, Set, make, shard_data

WARM = 8  # batches before the clock starts
WORKERS = (0, 1, 2)
OURS, LIMIT, BEST = "ours", "limit", "LitData, batch_decode=256"
AIMS = {  # our samples per second, relative to the others'
    "latents": {"webdataset": 10.0, "MosaicML Streaming": 1.0, "LitData": 1.0, BEST: 1.0},
    "jpeg": {
        "webdataset": 2.5, "webdataset, our decoder": 1.5, "MosaicML Streaming": 1.0, "LitData": 1.0, BEST: 1.0,
        LIMIT: 0.8,
    },
}  # fmt: skip
LIBRARIES = ("torch", "webdataset", "mosaicml-streaming", "litdata", "simplejpeg", "pillow", "numpy")
MEASURES = ("per_cpu_second", "per_second")
RATIOS = {  # what is compared, and what each one's number of workers has the most of
    "per second": ("per_second", "per_second"),
    "per CPU second": ("per_cpu_second", "per_second"),
    "per CPU second, thriftiest": ("per_cpu_second", "per_cpu_second"),
}
Results = Mapping[tuple[str, int], Sequence[Mapping[str, float]]]  # (contender, workers) -> one of each round


def measure(name: str, s: Set, folder: Path, workers: int, seconds: float) -> dict[str, float]:
    """Of one contender, in this process and those that it starts."""
    begin = CONTENDERS[name](s, folder, workers)
    at = time.perf_counter()
    batches = begin()
    check(next(batches), s)
    first_batch = time.perf_counter() - at
    for _ in islice(batches, WARM - 1):
        pass
    count, wall, cpu = 0, time.perf_counter(), cpu_seconds()
    for _ in islice(batches, s.count // s.batch - WARM - 4 * max(WORKERS)):
        count += 1
        if time.perf_counter() - wall > seconds:
            break
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    return {"per_second": count * s.batch / wall, "per_cpu_second": count * s.batch / cpu, "first_batch": first_batch}


def check(batch: Any, s: Set) -> None:
    """That it is a whole batch of what the others give, too."""
    images, labels = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
    assert len(labels) == len(images) == s.batch
    assert sorted(images.shape[1:]) == sorted(s.field.stored), images.shape
    assert str(images.dtype) == f"torch.{s.field.dtype}"


def cpu_seconds() -> float:
    """Of this process and all that descend from it, also of those that ended."""
    ticks, parents = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry)], ticks[int(entry)] = int(words[1]), sum(map(int, words[11:15]))

    def is_mine(process: int) -> bool:
        return process == os.getpid() or (process in parents and is_mine(parents[process]))

    return sum(t for process, t in ticks.items() if is_mine(process)) / os.sysconf("SC_CLK_TCK")


def limit(s: Set, processes: int, seconds: float) -> dict[str, float]:
    """The decoder alone: pictures in memory, one after the other into one buffer."""
    encoded, children = [s.make(i) for i in range(64)], []
    at, cpu = time.perf_counter(), cpu_seconds()
    ends = [os.pipe() for _ in range(processes)]
    for _, end in ends:
        if not (child := os.fork()):
            count, out = 0, np.empty((256, 256, 3), np.uint8)
            while time.perf_counter() - at < seconds:
                simplejpeg.decode_jpeg(encoded[count % 64], buffer=out)
                count += 1
            os.write(end, str(count).encode())
            os._exit(0)
        children.append(child)
    counts = [int(os.read(end, 100)) for end, _ in ends]
    for child in children:
        os.waitpid(child, 0)
    wall, cpu = time.perf_counter() - at, cpu_seconds() - cpu
    return {"per_second": sum(counts) / wall, "per_cpu_second": sum(counts) / cpu}


def alone(**call: Any) -> Any:
    """A call of this script in a process of its own; None if a library is missing."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = run_process(
        [sys.executable, __file__, "--call", json.dumps(call)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        print(f"left out: {call}: {' '.join(last)}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def called(what: str, set_name: str, folder: str = "", **rest: Any) -> Any:
    s = SETS[set_name]
    if what == "make":
        return make(s, Path(folder))
    if what == "limit":
        return limit(s, **rest)
    return measure(rest.pop("name"), s, Path(folder), **rest)


def rounds(s: Set, folder: Path, count: int, seconds: float) -> Results:
    """All contenders in turns, in another order each time."""
    calls = [(name, workers) for name in CONTENDERS for workers in WORKERS]
    calls += [(LIMIT, processes) for processes in (1, 2)] if s.name == "jpeg" else []
    found: dict[tuple[str, int], list] = {}
    for k in range(count):
        Random(k).shuffle(calls)
        for name, workers in list(calls):
            what = {"what": LIMIT, "processes": workers} if name == LIMIT else {
                "what": "measure", "name": name, "folder": str(folder), "workers": workers
            }  # fmt: skip
            result = alone(**what, set_name=s.name, seconds=seconds)
            if result is None:
                calls.remove((name, workers))
            else:
                found.setdefault((name, workers), []).append(result)
                print(f"  {s.name} {k} {name} {workers}: {result}", file=sys.stderr, flush=True)
    return found


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    return tuple(quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


def ratios(results: Results, other: str, measure: str, best_by: str) -> list[float]:
    """Ours over theirs in each round, of each with the number of workers that has the most of `best_by`."""
    ours, theirs = (
        [max(of_a_round, key=itemgetter(best_by))[measure] for of_a_round in zip(*runs, strict=True)]
        for runs in ([results[name, w] for w in WORKERS if (name, w) in results] for name in (OURS, other))
    )
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def table(s: Set, results: Results) -> str:
    lines = ["| | workers | samples per CPU second | samples/s | first |", "|---|---|---|---|---|"]
    for name, workers in _in_order(results):
        runs = results[name, workers]
        cells = [_shown(spread([r[m] for r in runs]), "{:,.0f}") for m in MEASURES]
        first = f"{spread([r['first_batch'] for r in runs])[1]:.2f}" if name != LIMIT else ""
        lines.append(f"| {name} | {workers} | {cells[0]} | {cells[1]} | {first} |")
    lines += ["", f"| ours / | {' | '.join(RATIOS)} | aim |", "|---|---|---|---|---|"]
    for other in dict.fromkeys(name for name, _ in _in_order(results) if name != OURS):
        cells = " | ".join(_shown(spread(ratios(results, other, *of)), "{:.2f}") for of in RATIOS.values())
        lines.append(f"| {other} | {cells} | {AIMS[s.name].get(other, '')} |")
    return "\n".join(lines)


def _in_order(results: Results) -> list[tuple[str, int]]:
    return sorted(results, key=lambda run: ([*CONTENDERS, LIMIT].index(run[0]), run[1]))


def _shown(spread: tuple[float, float, float], form: str) -> str:
    low, middle, high = (form.format(x) for x in spread)
    return f"{middle} ({low} to {high})"


def profile(s: Set, folder: Path) -> None:
    batches = shard_data(s, folder, 0)()
    next(batches)
    with cProfile.Profile() as found:
        for _ in islice(batches, s.count // s.batch):
            pass
    pstats.Stats(found).sort_stats("tottime").print_stats(18)


def versions() -> Iterator[str]:
    for name in LIBRARIES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"no {name}"


def main(arguments: Sequence[str]) -> int:
    options = read(arguments)
    if options.call:
        print(json.dumps(called(**json.loads(options.call))))
        return 0
    report: dict[str, Any] = {"versions": list(versions())}
    print(", ".join(report["versions"]))
    with tempfile.TemporaryDirectory() as temporary:
        for s in (SETS[name] for name in options.only):
            folder = (options.data or Path(temporary)) / s.name
            folder.mkdir(parents=True, exist_ok=True)
            alone(what="make", set_name=s.name, folder=str(folder))
            if options.profile:
                profile(s, folder)
                continue
            before = os.getloadavg()[0]
            results = rounds(s, folder, options.rounds, options.seconds)
            report[s.name] = {f"{name}, {workers}": runs for (name, workers), runs in results.items()}
            print(f"\n{s.name}, load average {before:.1f} to {os.getloadavg()[0]:.1f}\n\n{table(s, results)}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def read(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that keeps the sets")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a run, at most")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SETS), help=", ".join(SETS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, help="file for all numbers, as JSON")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
