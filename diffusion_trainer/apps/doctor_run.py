"""The doctor's checks of the run that is to be: its configuration, its data, and where its curves go."""

import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np

from diffusion_trainer.apps.doctor_facts import Run
from diffusion_trainer.apps.findings import (
    Check,
    Finding,
    Measured,
    Process,
    error,
    grouped,
    limited,
    nodes_of,
    ok,
    time_of,
    warning,
)
from diffusion_trainer.apps.train import preflight, sizes
from diffusion_trainer.callbacks.loggers import Wandb, logged_in, server
from diffusion_trainer.streaming.damage import MissingShard
from diffusion_trainer.streaming.data import ShardData, Unusable
from diffusion_trainer.streaming.pipeline import WebDatasetPipeline
from diffusion_trainer.training.agreement import Agreement

SHARDS_READ = 4  # of each node
CONNECT_SECONDS = 5
CONFIG_SECONDS = 15


@dataclass(frozen=True)
class Batch(Check):
    """Whether a global batch divides over processes, micro-batches and lanes."""

    run: Run

    name = "batch"
    mend = "see the message"

    def measure(self, here: Process, agreement: Agreement) -> str | None:
        if here.rank:
            return None
        c, size = self.run.config, self.run.size
        sizes(c, size)
        pieces = c["trainer"]["accumulate_grad_batches"]
        parts = f"{size} process{'es' if size > 1 else ''} x {pieces} micro-batch{'es' if pieces > 1 else ''}"
        steps = -(-c["num_images"] // c["batch_size"])
        return f"{c['batch_size']} = {parts} x {c['batch_size'] // size // pieces}, {c['lanes']} lanes, {steps:,} steps"

    def judge(self, measured: Measured) -> Iterator[Finding]:
        yield ok(self.name, measured[0][1])


@dataclass(frozen=True)
class Shards(Check):
    """Each node opens the index and reads a sample of some shards."""

    run: Run

    name = "data"
    mend = "see whether the file system with the shards is mounted there, or the URL answers"
    seconds = 15

    def measure(self, here: Process, agreement: Agreement) -> Mapping[str, Any] | None:
        if not here.leads:
            return None
        data, begin, bad = self.run.data, perf_counter(), []
        readers = self.run.size * max(1, self.run.loader.workers)
        facts: dict[str, Any] = {"batch_size": self.run.config["batch_size"], "readers": readers}
        if isinstance(data, ShardData):
            ends = np.cumsum([0, *(shard.samples for shard in data.samples.shards)])
            firsts = [int(first) for first, end in pairwise(ends) if end > first]
            looked_at = sorted({firsts[i] for i in np.linspace(0, len(firsts) - 1, SHARDS_READ).astype(int)})
            for first in looked_at:
                try:
                    data.batch([first])
                except Unusable as damaged:
                    bad.append((str(damaged), isinstance(damaged.__cause__, MissingShard)))
            facts |= {"shards": len(firsts), "samples": data.count, "looked_at": len(looked_at)}
        else:
            data.first(1)
            urls = len(data.urls) if isinstance(data, WebDatasetPipeline) else None
            facts |= {"shards": urls, "samples": None, "looked_at": 1}
        return {**facts, "bad": bad, "fingerprint": data.fingerprint, "seconds": perf_counter() - begin}

    def judge(self, measured: Measured) -> Iterator[Finding]:
        problems = list(_of_shards(self.name, measured))
        yield from problems
        if not problems:
            m = max((value for _, value in measured), key=lambda value: value["seconds"])
            count = "" if m["samples"] is None else f"{m['samples']:,} samples in "
            yield ok(
                self.name, f"{count}{m['shards']} shards for {m['readers']} readers; a sample of {m['looked_at']} of "
                f"them read in {time_of(m['seconds'])}",
            )  # fmt: skip


def _of_shards(name: str, measured: Measured) -> Iterator[Finding]:
    for (first, missing), processes in grouped([(p, v["bad"][0]) for p, v in measured if v["bad"]]).items():
        where = nodes_of(processes)
        if missing:
            yield error(name, first, "copy it there again, or index what there is: diffusion-trainer index", where)
        else:
            mend = "see how much is damaged (it is replaced, up to data.damage_budget): diffusion-trainer inspect"
            yield warning(name, first, mend, where)
    for processes in list(grouped(measured, lambda v: v["fingerprint"]).values())[1:]:
        mend = "copy shards and index there again: all nodes must see the same"
        yield error(name, "other shards here than on the other nodes", mend, nodes_of(processes))
    m = measured[0][1]
    if m["samples"] is not None and m["samples"] < m["batch_size"]:
        says = f"{m['samples']:,} samples are fewer than a batch of {m['batch_size']:,}: it has some of them twice"
        yield warning(name, says, "a smaller batch_size, or more data")
    if m["samples"] is None and m["shards"] is not None and m["shards"] < m["readers"]:
        says = f"{m['shards']} shards for {m['readers']} workers of all processes: several read the same one"
        yield warning(name, says, "fewer workers (data.num_workers), more and smaller shards, or index them")


def refused(run: Run, rank: int) -> Any:
    """What `Config` has measured. It is asked before the processes meet: where a group is, all must be asked."""

    def look() -> str:
        given = preflight(dict(run.config), run.size, run.folder)
        return f"train would start: {run.parameters / 1e6:.2f} M parameters" + (f"; {given}" if given else "")

    return None if rank else limited(look, CONFIG_SECONDS)


@dataclass(frozen=True)
class Config(Check):
    """All that `train` looks at before it starts; by the first process alone."""

    found: Any  # by `refused`

    name = "config"
    mend = "run train with the same arguments: it says more"

    def measure(self, here: Process, agreement: Agreement) -> Any:
        return self.found

    def judge(self, measured: Measured) -> Iterator[Finding]:
        yield ok(self.name, measured[0][1])


@dataclass(frozen=True)
class WeightsAndBiases(Check):
    """Whether the server that the run would send its curves to answers (else it goes on offline). Rank 0 sends."""

    run: Run

    name = "wandb"
    mend = "logger.wandb.mode=offline (send it later with `diffusion-trainer wandb-sync`), or logger=csv"
    needed = False  # a run goes on without it
    seconds = 2 * CONNECT_SECONDS

    def measure(self, here: Process, agreement: Agreement) -> Mapping[str, Any] | None:
        choices = [c for c in self.run.part("logger").values() if isinstance(c, Wandb)] if here.rank == 0 else []
        if not choices:
            return None
        mode = choices[0].resolved_mode()
        if mode != "online":
            return {"mode": mode}
        return {"mode": mode, "server": server(), "logged_in": logged_in(), "why": unreachable(server())}

    def judge(self, measured: Measured) -> Iterator[Finding]:
        process, m = measured[0]
        if m["mode"] != "online":
            later = ": send it later with `diffusion-trainer wandb-sync`" if m["mode"] == "offline" else ""
            yield ok(self.name, f"{m['mode']}{later}")
        elif m["why"]:
            mend = f"see the proxy (https_proxy) and WANDB_BASE_URL; or {self.mend}"
            yield warning(self.name, f"{m['server']} does not answer: {m['why']}", mend, [process.node])
        elif not m["logged_in"]:
            yield warning(self.name, "online, but nobody is logged in", f"wandb login; or {self.mend}", [process.node])
        else:
            yield ok(self.name, f"online, {m['server']} answers")


def unreachable(url: str, timeout_seconds: float = CONNECT_SECONDS) -> str | None:
    """Why nothing answers there; None if something does, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=timeout_seconds).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as problem:  # URLError is an OSError
        return str(problem)
    return None
