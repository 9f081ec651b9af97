"""What benchmarks/zero.py sees of a rank's traffic: its collectives and its sockets. Linux."""

import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

# Of a collective: how often (n - 1) / n of the whole tensor a rank of n sends, and which argument holds the whole. In a
# ring of broadcast or reduce n - 1 ranks send all of it: the mean over the ranks.
RING = {
    "allreduce_": (2, 0),
    "allreduce_coalesced_": (2, 0),
    "_allgather_base_": (1, 0),
    "allgather_": (1, 0),
    "allgather_into_tensor_coalesced_": (1, 0),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
    "broadcast_": (1, 0),
    "reduce_": (1, 0),
    "barrier": (0, 0),
}
SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info
SEGMENT = 1 << 20  # bytes, gloo's largest


class Collectives(TorchDispatchMode):
    """`sent`: bytes that this rank sends by the collectives inside, by their names, as rings would; `gloo`: as gloo
    does. Every collective of torch.distributed passes torch's dispatcher, whoever calls it, DDP's in C++ included.

    look: called before every operator.
    """

    def __init__(self, look: Callable[[], None] = lambda: None):
        super().__init__()
        self.look = look
        self.sent: Counter[str] = Counter()
        self.gloo = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.look()
        if function.namespace == "c10d":
            self._count(function._schema.name.split("::")[1], args)
        return function(*args, **kwargs or {})

    def _count(self, name: str, arguments: tuple) -> None:
        """KeyError for what is no known collective."""
        times, whole = RING[name]
        n = ranks_of(arguments)
        self.sent[name] += 0
        for tensor in flat(arguments[whole]) if times else ():
            sent = times * (n - 1) / n * tensor.nbytes
            self.sent[name] += sent
            self.gloo += sent * over_ring(name, tensor.nbytes, n)


def ranks_of(arguments: tuple) -> int:
    """Of the group of a collective."""
    group = next(a for a in arguments if isinstance(a, torch.ScriptObject) and str(a._type()).endswith("ProcessGroup"))
    return ProcessGroup.unbox(group).size()


def flat(tensors: Any) -> Iterator[Tensor]:
    """The tensors of nested lists."""
    if isinstance(tensors, Tensor):
        yield tensors
    else:
        for each in tensors:
            yield from flat(each)


def bytes_on_wire() -> int:
    """What this process's TCP sockets have sent so far, as Linux counts it."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.exists(path) or os.path.islink(path):  # the listing's own is closed
            total += sent_by(int(name)) if os.readlink(path).startswith("socket:") else 0
    return total


def sent_by(descriptor: int) -> int:
    with socket.socket(fileno=os.dup(descriptor)) as s:
        if s.family not in (socket.AF_INET, socket.AF_INET6) or s.type != socket.SOCK_STREAM:
            return 0
        return struct.unpack_from("Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), SENT)[0]


def over_ring(name: str, size: int, n: int) -> float:
    """How much more than a ring gloo's collective of `size` bytes sends on n ranks, all of them together.

    Its reduce-scatter is an all-reduce of which each rank keeps its part. Its reduce (gloo/reduce.cc) is a
    reduce-scatter in segments, of which each rank sends all but two, and then a gather.
    """
    if name.startswith(("_reduce_scatter", "reduce_scatter")):
        return 2.0
    if name != "reduce_" or n == 1 or not size:
        return 1.0
    segment = min(-(-size // (2 * n)), SEGMENT)
    segments = -(-max(-(-size // segment), 2 * n) // n) * n
    return (n * (1 - 2 / segments) + (n - 1) / n) / (n - 1)
