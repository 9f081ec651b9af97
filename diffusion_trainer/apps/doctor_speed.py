"""The doctor's stop watch: matrix products of each device, reductions over all, and the wires between nodes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed

from diffusion_trainer.apps.doctor_facts import Run
from diffusion_trainer.apps.findings import (
    Check,
    Finding,
    Measured,
    Process,
    below_peers,
    error,
    grouped,
    nodes_of,
    ok,
    size_of,
    time_of,
    warning,
)
from diffusion_trainer.training.agreement import Agreement

REDUCED_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
NO_GPU = "CPU process"
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices
MATMUL_SECONDS = 0.5
TIMEOUT_SECONDS = 15  # of a collective


@dataclass(frozen=True)
class Devices(Check):
    """Name and memory of each GPU: of one kind everywhere."""

    run: Run

    name = "devices"
    mend = "see what nvidia-smi says there"
    seconds = 20  # the driver takes some to start

    def measure(self, here: Process, agreement: Agreement) -> list[str]:
        return [_describe(device) for device in self.run.devices]

    def judge(self, measured: Measured) -> Iterator[Finding]:
        kinds = grouped([(process, text) for process, texts in measured for text in texts])
        usual = next(iter(kinds))
        for kind, processes in list(kinds.items())[1:]:
            says, where = f"{kind} here, {usual} elsewhere", nodes_of(processes)
            if NO_GPU in (kind, usual):
                lost = where if kind == NO_GPU else nodes_of(kinds[usual])
                yield error(self.name, says, f"{self.mend}; leave out the node without GPU (--exclude=<node>)", lost)
            else:
                mend = "all wait for the slowest: ask for nodes of one kind (--constraint, --exclude)"
                yield warning(self.name, says, mend, where)
        if len(kinds) == 1:
            yield ok(self.name, f"{sum(len(texts) for _, texts in measured)} x {usual}")


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return NO_GPU
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} with {properties.total_memory / 1e9:.0f} GB"


@dataclass(frozen=True)
class Matmul(Check):
    """Speed of a matrix product, on all devices at about the same time. slow: a share of the others' median."""

    run: Run
    slow: float

    name = "matmul"
    mend = "see what dmesg and nvidia-smi -q say there; leave the node out (--exclude=<node>)"
    seconds = 15

    def measure(self, here: Process, agreement: Agreement) -> list[tuple[str, float]]:
        return [(str(device), flops(device, self.run.dtype)) for device in self.run.devices]

    def judge(self, measured: Measured) -> Iterator[Finding]:
        speeds = {(p, device): speed for p, found in measured for device, speed in found}
        slow = below_peers(speeds, self.slow)
        for (process, device), share in slow.items():
            speed = f"{speeds[process, device] / 1e12:.3g} TFLOP/s, {share:.0%} of the others' median"
            mend = (
                "all wait for it in every step: see what else runs there and whether it is hot, or leave the node out"
            )
            says = f"rank {process.rank} ({device}) is slow: {speed}"
            yield warning(self.name, says, f"{mend} (--exclude=<node>)", [process.node])
        if not slow:
            says = f"{median(speeds.values()) / 1e12:.3g} TFLOP/s"
            many = (
                f" each, the slowest of {len(speeds)} {min(speeds.values()) / max(speeds.values()):.0%} of the fastest"
            )
            yield ok(self.name, says + (many if len(speeds) > 1 else ""))


def flops(device: torch.device, dtype: torch.dtype, seconds: float = MATMUL_SECONDS) -> float:
    """Floating-point operations a second of a product of square matrices, the median of those of `seconds`."""
    side = SIDE[device.type]
    a = torch.randn(side, side, device=device).to(dtype)
    times = timed(lambda: torch.mm(a, a), device, seconds)
    return 2 * side**3 / median(times)


def timed(action: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds that each call took, at least three, after one that does not count."""
    times: list[float] = []
    end = float("inf")
    while len(times) < 4 or time.perf_counter() < end:
        begin = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
        if len(times) == 1:
            end = time.perf_counter() + seconds
    return times[1:]


@dataclass(frozen=True)
class AllReduce(Check):
    """Over gloo, by which ranks agree, and over NCCL where all have GPUs."""

    run: Run

    name = "all-reduce"
    mend = (
        "see whether all nodes reach each other (firewall, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); NCCL_DEBUG=INFO "
        "says what it tries"
    )
    seconds = float("inf")

    def measure(self, here: Process, agreement: Agreement) -> Mapping[str, Any] | None:
        if agreement.world == 1:
            return None
        found = {"gloo": _reduction(torch.device("cpu"), None)}
        if all(agreement.gather(self.run.gpu)):
            device = self.run.devices[0]
            torch.cuda.set_device(device)  # of this thread
            group = distributed.new_group(backend="nccl", timeout=timedelta(seconds=TIMEOUT_SECONDS))
            found["nccl"] = _reduction(device, group)
        return {"speeds": found, "gradient_bytes": 4 * self.run.parameters}

    def judge(self, measured: Measured) -> Iterator[Finding]:
        m = measured[0][1]
        for backend, (speed, latency) in m["speeds"].items():
            says = f"{backend} over {len(measured)} processes: {size_of(speed)}/s, {time_of(latency)} at least"
            yield ok(self.name, f"{says}; this model's gradients {time_of(m['gradient_bytes'] / speed)}")


def _reduction(device: torch.device, group: distributed.ProcessGroup | None) -> tuple[float, float]:
    """Bytes a second of a large tensor; seconds of a small one."""
    large = torch.zeros(REDUCED_BYTES[device.type] // 4, device=device)
    small = torch.zeros(1, device=device)

    def reduce(tensor: Tensor, count: int) -> float:
        times = []
        for _ in range(count + 1):
            begin = time.perf_counter()
            distributed.all_reduce(tensor, group=group)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
        return median(times[1:])

    latency = reduce(small, 10)
    return large.numel() * 4 / reduce(large, 3), latency


@dataclass(frozen=True)
class Wires(Check):
    """Each node sends to the next, all at once: a node is slow if both the wire from it and the wire to it are."""

    slow: float

    name = "network"
    mend = "see whether all nodes reach each other (firewall, GLOO_SOCKET_IFNAME)"
    seconds = float("inf")

    def measure(self, here: Process, agreement: Agreement) -> float | None:
        """Bytes a second from the leader before this one."""
        if len(here.leaders) < 3:  # one wire, which all-reduce has measured
            return None
        return ring(here.leaders, here.rank, agreement)

    def judge(self, measured: Measured) -> Iterator[Finding]:
        into = {process: speed for process, speed in measured if process.leads}
        leaders = list(into)
        best = {p: max(into[p], into[leaders[(i + 1) % len(leaders)]]) for i, p in enumerate(leaders)}
        slow = below_peers(best, self.slow)
        for process, share in slow.items():
            yield warning(
                self.name, f"slow wire: {size_of(best[process])}/s, {share:.0%} of the other nodes' median",
                "leave the node out (--exclude=<node>); see the errors that ethtool -S or ibstat count", [process.node],
            )  # fmt: skip
        if not slow:
            yield ok(self.name, f"node to node {size_of(min(into.values()))}/s at least, over gloo")


def ring(leaders: Sequence[int], rank: int, agreement: Agreement) -> float | None:
    """All must call it; None for those that are no leaders."""
    out, into = torch.zeros(REDUCED_BYTES["cpu"] // 4), torch.empty(REDUCED_BYTES["cpu"] // 4)
    times = []
    for _ in range(3):
        agreement.any(False)
        if rank in leaders:
            at = leaders.index(rank)
            begin = time.perf_counter()
            sent = distributed.isend(out, leaders[(at + 1) % len(leaders)])
            distributed.irecv(into, leaders[at - 1]).wait()
            times.append(time.perf_counter() - begin)
            sent.wait()
    return out.numel() * 4 / min(times) if times else None
