"""The doctor's checks of each node by itself, and of the nodes against each other."""

import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_trainer.apps.config import CONF
from diffusion_trainer.apps.doctor_facts import Run
from diffusion_trainer.apps.findings import (
    Check,
    Finding,
    Measured,
    Process,
    error,
    grouped,
    nodes_of,
    ok,
    size_of,
    time_of,
    warning,
)
from diffusion_trainer.training.agreement import Agreement

PACKAGES = ("torch", "lightning", "deepspeed", "numpy", "webdataset", "diffusion-trainer")
OPEN_FILES = 1024  # that a process should be allowed


class Versions(Check):
    """Python, libraries, and this project's own code, by a checksum that sees edits."""

    name = "versions"
    mend = "install the project on every node from the same checkout (make setup), best on a file system that all see"

    def measure(self, here: Process, agreement: Agreement) -> dict[str, str]:
        found = {name: importlib.metadata.version(name) for name in PACKAGES}
        cuda = torch.version.cuda or "none"
        return {"python": platform.python_version(), **found, "cuda": cuda, "commit": commit(), "code": code()}

    def judge(self, measured: Measured) -> Iterator[Finding]:
        different = False
        for key in measured[0][1]:
            groups = grouped(measured, lambda value, key=key: value[key])
            for value, processes in list(groups.items())[1:]:
                different = True
                says = f"{key} {value} here, {next(iter(groups))} on {'most' if len(groups) > 2 else 'the others'}"
                yield error(self.name, says, self.mend, nodes_of(processes))
        if not different:
            shown = {key: value for key, value in measured[0][1].items() if key in ("python", "torch", "deepspeed")}
            everywhere = f", equal on {len(measured)} processes" if len(measured) > 1 else ""
            text = ", ".join(f"{key} {value}" for key, value in shown.items())
            yield ok(self.name, f"{text}, commit {measured[0][1]['commit']}{everywhere}")


def commit() -> str:
    """Of the checkout, if it is one and git answers."""
    if not (CONF.parent / ".git").exists() or not shutil.which("git"):
        return "unknown"
    git = ["git", "-C", str(CONF.parent), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def code() -> str:
    """A checksum of the package and of the configurations as they lie there."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(digest_size=6)
    for root in (package, CONF):
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.yaml")]):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Clock(Check):
    """How far the nodes' clocks are apart: read when all leave a barrier, so to some milliseconds."""

    limit_seconds: float

    name = "clock"
    mend = "switch on time synchronisation there (chrony or ntpd): logs, file times and TLS go by the clock"
    seconds = float("inf")

    def measure(self, here: Process, agreement: Agreement) -> float:
        agreement.any(False)
        return time.time()

    def judge(self, measured: Measured) -> Iterator[Finding]:
        clocks = {process: seconds for process, seconds in measured if process.leads}
        usual = sorted(clocks, key=clocks.get)[(len(clocks) - 1) // 2]  # of two, neither is known to be right
        off = {process: seconds - clocks[usual] for process, seconds in clocks.items()}
        wrong = {process: value for process, value in off.items() if abs(value) > self.limit_seconds}
        for process, value in wrong.items():
            way = "ahead of" if value > 0 else "behind"
            yield warning(self.name, f"{time_of(abs(value))} {way} {usual.node}", self.mend, [process.node])
        if not wrong and len(off) > 1:
            yield ok(self.name, f"{len(off)} nodes agree to {time_of(max(off.values()) - min(off.values()))}")


@dataclass(frozen=True)
class Cores(Check):
    """Processes of each node, and whether it has a core for each of their workers."""

    run: Run

    name = "cores"
    mend = "see the message"

    def measure(self, here: Process, agreement: Agreement) -> Mapping[str, Any]:
        own = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))
        return {"cores": own, "workers": self.run.loader.workers, "local": self.run.local_size, "size": self.run.size}

    def judge(self, measured: Measured) -> Iterator[Finding]:
        counts = {node: len(processes) for node, processes in grouped([(p, p.node) for p, _ in measured]).items()}
        if len(set(counts.values())) > 1:
            says = f"processes of each node: {', '.join(f'{count} on {node}' for node, count in counts.items())}"
            mend = "start as many on each node: --ntasks-per-node=<n>, or torchrun --nproc-per-node=<n>"
            yield error(self.name, says, mend)
            return
        cores = {node: len({c for p, v in measured if p.node == node for c in v["cores"]}) for node in counts}
        m = measured[0][1]
        says = f"{min(cores.values())} a node, for {m['local']} x (1 process + {m['workers']} workers)"
        few = [node for node, count in cores.items() if count < m["local"] * (1 + m["workers"])]
        if few and m["workers"] and len(measured) >= m["size"]:  # else the run's processes may be given more
            mend = "they will take turns: fewer workers (data.num_workers=<n>), or more cores (--cpus-per-task)"
            yield warning(self.name, says, mend, few)
        else:
            yield ok(self.name, says)


@dataclass(frozen=True)
class OpenFiles(Check):
    name = "open files"
    mend = f"raise the limit in the job's script: ulimit -n {OPEN_FILES * 4}"

    def measure(self, here: Process, agreement: Agreement) -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def judge(self, measured: Measured) -> Iterator[Finding]:
        low = [(p, limit) for p, limit in measured if 0 <= limit < OPEN_FILES]
        for limit, processes in grouped(low).items():
            yield warning(self.name, f"{limit} for a process", self.mend, nodes_of(processes))
        if not low:
            yield ok(self.name, f"{min(limit for _, limit in measured):,} for a process")


@dataclass(frozen=True)
class Memory(Check):
    """Of the host: what is free against what the node's processes take, as far as that is known."""

    run: Run

    name = "memory"
    mend = "fewer workers (data.num_workers, data.prefetch), a smaller batch, or ask for more memory (--mem)"

    def measure(self, here: Process, agreement: Agreement) -> Mapping[str, int] | None:
        if not here.leads or sys.platform != "linux":
            return None
        return {"free": available(), "needed": self.run.host_bytes}

    def judge(self, measured: Measured) -> Iterator[Finding]:
        small = [(p, v["free"]) for p, v in measured if v["free"] < v["needed"]]
        takes = f"a node takes about {size_of(measured[0][1]['needed'])}, besides libraries and activations"
        for free, processes in grouped(small).items():
            yield warning(self.name, f"{size_of(free)} free; {takes}", self.mend, nodes_of(processes))
        if not small:
            yield ok(self.name, f"{size_of(min(v['free'] for _, v in measured))} free; {takes}")


def available() -> int:
    """Bytes of memory that a process may still take: of the machine, and of its control groups (jobs, containers)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = next((g for g in Path("/proc/self/cgroup").read_text().splitlines() if g.startswith("0::")), "0::/")[3:]
    root = Path("/sys/fs/cgroup")
    for folder in [root / group.lstrip("/"), *(root / group.lstrip("/")).parents]:
        limit, used = folder / "memory.max", folder / "memory.stat"
        if root not in (folder, *folder.parents) or not limit.is_file():
            continue
        text = limit.read_text().strip()
        if text != "max":
            stat = dict(line.split() for line in used.read_text().splitlines())
            free = min(free, int(text) - int(stat["anon"]))  # the rest of it are caches
    return max(0, free)
