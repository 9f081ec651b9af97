"""What benchmarks/zero.py sees of a rank's memory: storages, saved tensors and what malloc has handed out. glibc 2.33
or newer."""

import ctypes
import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from zero_traffic import Collectives, bytes_on_wire, flat

from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.ema import KEY
from diffusion_trainer.training.module import DiffusionModule
from diffusion_trainer.training.sharding import Replicated, Sharding
from diffusion_trainer.training.strategies import Strategy, ZeroPartitionedWeights

NAMES = ("weights", "masters", "moments", "ema", "gathered", "buckets", "gradients", "other")  # of memory
WHOLE = ("held", "tensors")  # at the optimizer's step: of malloc, and all of the above together


class _Mallinfo2(ctypes.Structure):
    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def bytes_handed_out() -> int:
    """By malloc, to this process, and not given back: all of torch's tensors on CPUs, whoever in C++ or Python holds
    them, and what else is there.
    """
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd  # from the heaps; by mmap, as large ones


class Storages:
    """Counts the memory behind tensors; what was counted before counts nothing."""

    def __init__(self, seen: Iterable[int] = ()):
        self.seen = set(seen)

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Bytes."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total


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
        if key not in {weight.untyped_storage().data_ptr() for weight in self.weights}:
            self.bytes += 0 if self.users[key] else size
            self.peak = max(self.peak, self.bytes)
            self.users[key] += 1
            weakref.finalize(kept, self._release, key, size)
        return kept

    def _release(self, key: int, size: int) -> None:
        self.users[key] -= 1
        self.bytes -= 0 if self.users[key] else size


def memory(parameters: Sequence[nn.Parameter], sharding: Sharding) -> dict[str, Iterable[Tensor]]:
    """What this rank holds, in the order in which it is to be counted: masters may alias the weights."""
    masters = sharding.masters()
    state = [sharding.optimizer.state[m] for m in masters]
    return {
        "weights": kept(parameters, sharding),
        "masters": masters,
        "moments": [s[key] for s in state for key in ("exp_avg", "exp_avg_sq") if key in s],
        "ema": [average for s in state for key, average in s.items() if key.split(".")[0] == KEY],
        **moving(parameters, masters, sharding),
    }


def kept(parameters: Sequence[nn.Parameter], sharding: Sharding) -> list[Tensor]:
    """The weights that this rank holds at all times."""
    return [p.ds_tensor for p in parameters] if isinstance(sharding, ZeroPartitionedWeights) else list(parameters)


def moving(
    parameters: Sequence[nn.Parameter], masters: Sequence[Tensor], sharding: Sharding
) -> dict[str, Iterable[Tensor]]:
    """What comes and goes within a step. "gathered" are stage 3's weights beyond what is `kept`; "buckets" are
    allocated, whatever part of them is in use.
    """
    gradients = [p.grad for p in chain(parameters, masters) if p.grad is not None]
    return {
        "gathered": parameters if isinstance(sharding, ZeroPartitionedWeights) else (),
        "buckets": buckets(sharding),  # before the gradients, which may be views of them
        "gradients": gradients + parts_of_gradients(sharding),
    }


def places(tensors: Iterable[Tensor]) -> set[int]:
    """Of their storages."""
    storages = Storages()
    storages.add(tensors)
    return storages.seen


def sizes(tensors: Mapping[str, Iterable[Tensor]], seen: Iterable[int] = ()) -> dict[str, int]:
    """Bytes. seen: where storages are that do not count."""
    counted = Storages(seen)
    return {name: counted.add(each) for name, each in tensors.items()}


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
    """Measures one step of training, the third: the first ones make the optimizer's state and DDP's final buckets.

    To be made before the model: what malloc has handed out since is `held`.
    """

    AT = 2

    def __init__(self, strategy: Strategy):
        self.strategy = strategy
        self.peak: Counter[str] = Counter()
        self.stack = ExitStack()
        gc.collect()
        self.earlier = places(live_tensors())  # of runs before this one: not all that is DeepSpeed's goes with it
        self.before_model = bytes_handed_out()

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        self.agreement, self.parameters = Agreement(), list(module.model.parameters())
        self.sharding = self.strategy.sharding(module.model, trainer)
        self.masters = self.sharding.masters()
        self.sharding.optimizer.register_step_pre_hook(lambda *_: self._look_at_all())

    def _look(self) -> None:
        now = moving(self.parameters, self.masters, self.sharding)
        self.peak |= Counter(sizes(now, self.always_there))  # the larger of each

    def _look_at_all(self) -> None:
        held = bytes_handed_out() - self.before_model  # first: looking takes memory
        known = memory(self.parameters, self.sharding)
        now = Counter(sizes(known))
        now["other"] = Storages(self.earlier | places(chain(*known.values()))).add(live_tensors())
        self.peak |= now | Counter(held=held, tensors=now.total())

    def on_train_batch_start(self, trainer: Trainer, module: DiffusionModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.AT:
            self.peak.clear()
            self.activations, self.collectives = Activations(self.parameters), Collectives(self._look)
            self.always_there, self.before = places(kept(self.parameters, self.sharding)), bytes_on_wire()
            self.stack.enter_context(self.activations)
            self.stack.enter_context(self.collectives)

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, outputs, batch, batch_idx: int) -> None:
        if batch_idx == self.AT:
            self.stack.close()
            self.wire = bytes_on_wire() - self.before

    def on_train_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        ranks = self.agreement.gather({**self.peak, "activations": self.activations.peak})
        self.memory = {name: max(rank.get(name, 0) for rank in ranks) for name in [*NAMES, *WHOLE, "activations"]}
        names = sorted(self.collectives.sent)
        self.sent = dict(zip(names, self.agreement.mean([self.collectives.sent[n] for n in names]), strict=True))
        self.wire, self.gloo = self.agreement.mean([float(self.wire), self.collectives.gloo])
