"""How a run is spread over processes. The only file that knows DeepSpeed: 0.19's internals, each held by a test."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from types import MethodType
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies import Strategy as LightningStrategy
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.optim import Optimizer

from diffusion_trainer.training.nonfinite import DecidesItself
from diffusion_trainer.training.sharding import Replicated, Sharding, Slot


class Strategy(ABC):
    """A choice of conf/strategy. `max_processes` None is as many as there are."""

    max_processes: int | None = None
    timeout_seconds: int = 600  # of a collective
    compiles: bool = True  # whether a compiled network is of any use

    @abstractmethod
    def lightning(self, device: str) -> LightningStrategy:
        """For `device` cpu or cuda, built in the process that trains."""

    @abstractmethod
    def sharding(self, model: nn.Module, trainer: Any) -> Sharding:
        """After the trainer has set the strategy up."""


@dataclass(frozen=True)
class Single(Strategy):
    """One process, one device."""

    max_processes = 1

    def lightning(self, device: str) -> LightningStrategy:
        return SingleDeviceStrategy(device="cpu" if device == "cpu" else "cuda:0")

    def sharding(self, model: nn.Module, trainer: Any) -> Sharding:
        return Replicated(model, trainer.optimizers[0], strategy=repr(self))


@dataclass(frozen=True)
class Ddp(Strategy):
    """Every process holds everything; gradients are averaged (ZeRO's "stage 0")."""

    timeout_seconds: int = 600

    def lightning(self, device: str) -> LightningStrategy:
        _default_timeout(self.timeout_seconds)
        timeout = timedelta(seconds=self.timeout_seconds)
        # Gradients lie in the buckets that they are reduced in, not beside them.
        return DDPStrategy(process_group_backend=_backend(device), timeout=timeout, gradient_as_bucket_view=True)

    def sharding(self, model: nn.Module, trainer: Any) -> Sharding:
        return Replicated(model, trainer.optimizers[0], strategy=repr(self))


@dataclass(frozen=True)
class Zero(Strategy):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020): stage 1 shards optimizer state, 2 gradients too, 3 weights too.

    offload_optimizer: optimizer state (moments, fp32 master weights, EMA) lives in the CPU's memory, and the step is
    taken there by torch's AdamW (Ren et al. 2021, ZeRO-Offload, which has an Adam of its own for it).
    """

    stage: int
    timeout_seconds: int = 600
    offload_optimizer: bool = False

    def __post_init__(self):
        if self.stage not in (1, 2, 3):
            raise ValueError(f"stage must be 1, 2 or 3, not {self.stage} (for stage 0 use strategy=ddp)")
        if self.offload_optimizer and self.stage == 1:
            raise ValueError("offload_optimizer takes the gradients along: it needs stage 2 or 3, not 1")

    @property
    def compiles(self) -> bool:
        # Stage 3 gathers and frees weights in Python hooks around every layer: a graph ends at each of them.
        return self.stage < 3

    def lightning(self, device: str) -> LightningStrategy:
        os.environ.setdefault("DS_ACCELERATOR", device)  # before deepspeed is imported
        import deepspeed

        # The operator is only for inference, compiles for a minute at start, and a process that dies meanwhile leaves
        # a lock on which every later job waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _default_timeout(self.timeout_seconds)  # DeepSpeed makes groups of its own without a time-out
        kind = _CpuDeepSpeed if device == "cpu" else _DeepSpeed
        strategy = kind(
            stage=self.stage,
            process_group_backend=_backend(device),
            timeout=timedelta(seconds=self.timeout_seconds),
            logging_batch_size_per_gpu=1,  # only for DeepSpeed's own log; the loader has no batch_sampler to read
            # In stage 1 it means, too, that gradients leave in the backward pass that ends a step, not all after it.
            overlap_comm=device != "cpu" or self.stage == 1,
            offload_optimizer=self.offload_optimizer,
            pin_memory=self.offload_optimizer and device != "cpu",
        )
        # DeepSpeed would insist on its own Adam, which compiles for minutes at the first start; ours keeps the EMA too.
        strategy.config["zero_force_ds_cpu_optimizer"] = False
        # Else stages 1 and 2 all-reduce gradients, twice the bytes of a reduce to the one rank that keeps them.
        strategy.config["zero_optimization"]["use_multi_rank_bucket_allreduce"] = False
        return strategy

    def sharding(self, model: nn.Module, trainer: Any) -> Sharding:
        kind = ZeroPartitionedWeights if self.stage == 3 else ZeroReplicatedWeights
        return kind(model, trainer.optimizers[0], trainer.global_rank, strategy=repr(self))


def _backend(device: str) -> str:
    return "gloo" if device == "cpu" else "nccl"


def _default_timeout(seconds: int) -> None:
    timeout = timedelta(seconds=seconds)
    distributed_c10d.default_pg_timeout = timeout
    if distributed_c10d.default_pg_nccl_timeout is not None:
        distributed_c10d.default_pg_nccl_timeout = timeout


class _DeepSpeed(DeepSpeedStrategy, DecidesItself):
    def _setup_model_and_optimizer(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        engine, zero = super()._setup_model_and_optimizer(*args, **kwargs)
        if engine.zero_optimization_stage() == 3:
            _override(zero, _prepare_fp32_grad_for_sub_group=_partition_of_stage_3, _get_norm_groups=_norms_of_stage_3)
            return engine, zero
        _override(zero, allreduce_and_copy=_reduce_to_owner)
        if not zero.cpu_offload:  # where the flat gradients are the CPU's, and there is one copy on the device
            _override(zero, _use_compact_grad_partition_buffer=lambda zero, group: True)
        return engine, zero

    def backward(self, closure_loss, optimizer, *args: Any, **kwargs: Any) -> None:
        # Lightning has divided the loss by accumulate_grad_batches; DeepSpeed would once more.
        super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


def _override(zero: Any, **methods: Callable) -> None:
    for name, method in methods.items():
        if not callable(getattr(zero, name, None)):
            raise RuntimeError(f"this DeepSpeed has no {type(zero).__name__}.{name}; the one in constraints.txt has")
        setattr(zero, name, MethodType(method, zero))


def _reduce_to_owner(zero: Any, parts: list[Tensor], dtype: torch.dtype, rank: int, output_bucket: list, **kw) -> None:
    """DeepSpeed's, which waits for the device before each, for gradients that are not contiguous. Ours are."""
    kw.pop("log")
    reduced = zero.allreduce_bucket(parts, dtype, rank=rank, **kw)
    if rank == distributed_c10d.get_rank(kw["process_group"]):
        for part, whole, out in zip(parts, zero.unflatten(reduced, parts), output_bucket, strict=True):
            zero._add_to_grad_partition_buffer(out, whole)
            part.copy_(whole)


def _partition_of_stage_3(zero: Any, group: int) -> None:
    """DeepSpeed's, which copies gradients that lie one after the other in a buffer, to lie one after the other."""
    parts, master = zero.averaged_gradients[group], zero.fp32_partitioned_groups_flat[group]
    places = accumulate((part.nbytes for part in parts), initial=parts[0].data_ptr())
    if any(part.data_ptr() != place for part, place in zip(parts, places, strict=False)):
        raise RuntimeError("this DeepSpeed's gradients do not lie in a row; those of the one in constraints.txt do")
    master.grad, zero.averaged_gradients[group] = parts[0].as_strided(master.shape, (1,)), None


def _norms_of_stage_3(zero: Any) -> list[Tensor]:
    """DeepSpeed's, in float64; not finite (-1) where their squares are not in float32, as elsewhere."""
    norms = [torch.as_tensor(norm) for norm in type(zero)._get_norm_groups(zero)]
    squares = sum(norm.double().square() for norm in norms).float()
    return [torch.where(squares.isfinite(), norm, -1.0) for norm in norms]


class _CpuDeepSpeed(_DeepSpeed):
    """Lightning refuses DeepSpeed off CUDA, but gloo on CPUs runs every stage."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)


@dataclass(frozen=True)
class ZeroReplicatedWeights(Sharding):
    """Stages 1 and 2: a flat fp32 partition of each parameter group, beside the whole weights."""

    model: nn.Module
    zero: Any  # DeepSpeedZeroOptimizer
    rank: int
    replicated: bool = False
    strategy: str = ""

    @property
    def optimizer(self) -> Optimizer:
        return self.zero.optimizer

    def masters(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def slots(self) -> Iterator[Slot]:
        names = {p: name for name, p in self.model.named_parameters()}
        for master, group in zip(self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups, strict=True):
            for p in group:
                part = p._hp_mapping  # None where no element of p is in this rank's partition
                if part is not None:
                    here, there = part.hp_fragment_address, part.lp_fragment_address
                    yield Slot(names[p], there.start, here.numel, master, here.start)

    def publish(self) -> None:
        self.zero.update_lp_params()


@dataclass(frozen=True)
class ZeroPartitionedWeights(Sharding):
    """Stage 3: every parameter is cut into equal parts, one for each rank; the last may be padded."""

    model: nn.Module
    zero: Any  # DeepSpeedZeroOptimizer_Stage3
    rank: int
    replicated: bool = False
    strategy: str = ""

    @property
    def optimizer(self) -> Optimizer:
        return self.zero.optimizer

    def masters(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def slots(self) -> Iterator[Slot]:
        names = {p: name for name, p in self.model.named_parameters()}
        for master, group in zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True):
            at = 0
            for p in group:
                size = p.partition_numel()
                count = min(size, p.ds_numel - self.rank * size)
                if count > 0:
                    yield Slot(names[p], self.rank * size, count, master, at)
                at += size

    def publish(self) -> None:
        # The tail of DeepSpeed's own step(): parameters that stay gathered are partitioned, rewritten, gathered again.
        self.zero.checkpoint_event_prologue()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero.checkpoint_event_epilogue()
