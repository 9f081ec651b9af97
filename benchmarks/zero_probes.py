"""What benchmarks/zero.py looks with: storages, saved tensors, collectives and sockets of one rank."""

import gc
import os
import socket
import struct
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.ema import KEY
from diffusion_trainer.training.module import DiffusionModule
from diffusion_trainer.training.sharding import Replicated, Sharding
from diffusion_trainer.training.strategies import Strategy, ZeroPartitionedWeights

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
NAMES = ("weights", "gathered", "masters", "moments", "ema", "buckets", "gradients", "other")  # of memory
SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info


class Storages:
    """Counts the memory behind tensors; what was counted before counts nothing."""

    def __init__(self):
        self.seen: set[int] = set()

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Bytes."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total


class Collectives(TorchDispatchMode):
    """`sent`: bytes that this rank sends by the collectives inside, by their names, as rings would. Every collective of
    torch.distributed passes torch's dispatcher, whoever calls it, DDP's reducer in C++ included.

    look: called before every operator.
    """

    def __init__(self, look: Callable[[], None] = lambda: None):
        super().__init__()
        self.look = look
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.look()
        if function.namespace == "c10d":
            name = function._schema.name.split("::")[1]
            self.sent[name] += sent(name, args)
        return function(*args, **kwargs or {})


def sent(name: str, arguments: tuple) -> float:
    """Bytes. KeyError for what is no known collective."""
    times, whole = RING[name]
    group = next(a for a in arguments if isinstance(a, torch.ScriptObject) and str(a._type()).endswith("ProcessGroup"))
    n = ProcessGroup.unbox(group).size()
    return times * (n - 1) / n * sum(tensor.nbytes for tensor in flat(arguments[whole]))


def flat(tensors: Any) -> Iterator[Tensor]:
    """The tensors of nested lists."""
    if isinstance(tensors, Tensor):
        yield tensors
    else:
        for each in tensors:
            yield from flat(each)


class Kept:
    """A tensor that autograd holds; weakly referable, without the graph that would keep itself alive."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()


class Activations(saved_tensors_hooks):
    """`peak`: most bytes of what autograd keeps for the backward pass at a time, the weights excepted."""

    def __init__(self, weights: Iterable[nn.Parameter]):
        super().__init__(self._pack, lambda kept: kept.tensor)
        self.weights = list(weights)
        self.users: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def _pack(self, tensor: Tensor) -> Kept:
        kept, storage = Kept(tensor), tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if all(key != weight.untyped_storage().data_ptr() for weight in self.weights):
            self.bytes += 0 if self.users[key] else size
            self.peak = max(self.peak, self.bytes)
            self.users[key] += 1
            weakref.finalize(kept, self._release, key, size)
        return kept

    def _release(self, key: int, size: int) -> None:
        self.users[key] -= 1
        self.bytes -= 0 if self.users[key] else size


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


def memory(model: nn.Module, sharding: Sharding, live: Iterable[Tensor] = ()) -> dict[str, int]:
    """Bytes of this rank by what they hold, each storage once (so masters that alias the weights count nothing);
    "gathered" are weights beyond this rank's part of them, "other" those of `live` that none of the rest is. "buckets"
    are allocated, whatever part of them is in use.
    """
    parameters, masters, counted = list(model.parameters()), sharding.masters(), Storages()
    state = [sharding.optimizer.state[m] for m in masters]
    partitioned = isinstance(sharding, ZeroPartitionedWeights)
    names: dict[str, Iterable[Tensor]] = {
        "weights": [p.ds_tensor for p in parameters] if partitioned else parameters,
        "gathered": parameters,
        "masters": masters,
        "moments": [s[key] for s in state for key in ("exp_avg", "exp_avg_sq") if key in s],
        "ema": [average for s in state for key, average in s.items() if key.split(".")[0] == KEY],
        "buckets": buckets(sharding),  # before the gradients, which may be views of them
        "gradients": [p.grad for p in [*parameters, *masters] if p.grad is not None] + parts_of_gradients(sharding),
        "other": live,
    }
    return {name: counted.add(tensors) for name, tensors in names.items()}


def buckets(sharding: Sharding) -> list[Tensor]:
    """DeepSpeed's, from which gradients are reduced."""
    if isinstance(sharding, Replicated):
        return []
    return list(flat([bucket.buffer for bucket in sharding.zero.ipg_buckets.values() if bucket.buffer is not None]))


def parts_of_gradients(sharding: Sharding) -> list[Tensor]:
    """DeepSpeed's reduced gradients, before they become those of the masters."""
    if isinstance(sharding, Replicated):
        return []
    if isinstance(sharding, ZeroPartitionedWeights):
        return [sharding.zero.grad_partitions_flat_buffer]
    return [t for group in sharding.zero.averaged_gradients.values() for t in group or ()]


def live_tensors() -> Iterator[Tensor]:
    """All that Python knows of."""
    return (o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.device.type == "cpu")


class Probe(Callback):
    """Measures one step of training, the third: the first ones make the optimizer's state and DDP's final buckets."""

    AT = 2

    def __init__(self, strategy: Strategy):
        self.strategy = strategy
        self.peak: Counter[str] = Counter()
        self.stack = ExitStack()

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        self.agreement, self.model = Agreement(), module.model
        self.sharding = self.strategy.sharding(module.model, trainer)
        self.sharding.optimizer.register_step_pre_hook(lambda *_: self._look(live_tensors()))

    def _look(self, live: Iterable[Tensor] = ()) -> None:
        self.peak |= Counter(memory(self.model, self.sharding, live))  # the larger of each

    def on_train_batch_start(self, trainer: Trainer, module: DiffusionModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.AT:
            self.peak.clear()
            self.activations, self.collectives = Activations(self.model.parameters()), Collectives(self._look)
            self.before = bytes_on_wire()
            self.stack.enter_context(self.activations)
            self.stack.enter_context(self.collectives)

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, outputs, batch, batch_idx: int) -> None:
        if batch_idx == self.AT:
            self.stack.close()
            self.wire = bytes_on_wire() - self.before

    def on_train_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        if isinstance(trainer.model, DistributedDataParallel) and not trainer.model.gradient_as_bucket_view:  # C++'s
            sizes = trainer.model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
            self.peak["buckets"] = sum(int(size) for size in sizes.split(","))
            # The step is looked at after the backward pass: Python knows views of them then, in a list of DDP's.
            self.peak["other"] = max(0, self.peak["other"] - self.peak["buckets"])
        ranks = self.agreement.gather({**self.peak, "activations": self.activations.peak})
        self.memory = {name: max(rank.get(name, 0) for rank in ranks) for name in [*NAMES, "activations"]}
        names = sorted(self.collectives.sent)
        self.sent = dict(zip(names, self.agreement.mean([self.collectives.sent[n] for n in names]), strict=True))
        self.wire = self.agreement.mean([float(self.wire)])[0]
