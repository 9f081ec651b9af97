"""Measures the training step of any experiment, on CPUs or GPUs.

    python benchmarks/train_step.py experiment=digits strategy=single [overrides] [--steps 50] [--warmup 10] [--json F]

Trainer, module, optimizer, EMA and data loader are those of `diffusion-trainer train`, without its callbacks and
loggers. One process is measured here, several are started as `train` starts them; torchrun and srun work too.

images/s            of the global batch: median over the steps, quartiles and range
ms a step           from the end of one to the end of the next; on GPUs between CUDA events, so that no step is awaited
waiting for data    time in next() of rank 0's loader; on a GPU it costs nothing while the device has work in its queue
averages            time of rank 0 in the update of the EMA, of all its tracks; on GPUs the device's
MFU                 3 x the FLOPs (not multiply-adds) of a forward pass, per second, over the rate of square matrix
                    products in the run's precision: the best of half a second on each rank just before the first step,
                    all ranks at the same time, summed. On CPUs: of each process with its own threads, the others
                    working too. For known GPUs also over the datasheet's dense bf16 peak, whatever the precision
peak memory         of the largest rank: allocated by torch on a GPU, the process's resident set on a CPU
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion_trainer.apps import processes, rank
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import Parts, TrainConfig, check_network, parameter_shapes
from diffusion_trainer.apps.start import accept_interrupt
from diffusion_trainer.apps.train import check_data, sizes
from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.looking_ahead import LookingAhead
from diffusion_trainer.training import ema
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.module import DiffusionModule

DATASHEET = {"A100": 312e12, "H100 80GB HBM3": 989e12, "H200": 989e12}  # part of the name -> dense bf16 FLOP/s
TRAINING = 3  # FLOPs of a step over the forward pass's: each product there has two in the backward pass


class TimedLoader:
    """A data loader, and the seconds waited for its batches."""

    def __init__(self, loader):
        self.loader, self.waited = loader, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        for _ in range(len(self)):
            start = perf_counter()
            batch = next(batches)
            self.waited += perf_counter() - start
            yield batch


class TimedUpdate:
    """The update of the averages, with marks before and after each call."""

    def __init__(self, update: Callable[..., None]):
        self.update = update
        self.marks: list[tuple] = []

    def __call__(self, averages: list[Tensor], weights: list[Tensor], share: Any) -> None:
        before = mark(averages[0].device)
        self.update(averages, weights, share)
        self.marks.append((before, mark(averages[0].device)))


class Stopwatch(Callback):
    """Marks the end of every step without waiting for the device."""

    def __init__(self, loader: TimedLoader, update: TimedUpdate, dtype: torch.dtype):
        self.loader, self.update, self.dtype = loader, update, dtype
        self.marks: list = []
        self.updates: list[int] = []  # of the averages, until the end of each step
        self.waits: list[float] = []  # seconds waited for data until the end of each step

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        self.load_average = os.getloadavg()[0]
        self.agreement = Agreement()
        self.agreement.any(False)  # all ranks begin at the same time
        self.peak = sum(self.agreement.gather(matmul_rate(module.device, self.dtype)))
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.marks.append(mark(module.device))
            self.updates.append(len(self.update.marks))
            self.waits.append(self.loader.waited)

    def on_train_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        self.memory = max(self.agreement.gather(peak_memory(module.device)))


def mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(marks: Sequence) -> list[float]:
    if isinstance(marks[-1], float):
        return [after - before for before, after in pairwise(marks)]
    marks[-1].synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of square matrix products: the best of some."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), perf_counter() + seconds
    while perf_counter() < end:
        start = perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, perf_counter() - start)
    return 2 * n**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_flops(forward: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and convolutions of a call; a multiply-add is two."""
    # The fused attention of CPUs has no formula in the counter; attention as two products has.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    return counter.get_total_flops()


def forward_flops(config: Mapping[str, Any]) -> float:
    """For one image. Counted on tensors without memory, so alike on every device and strategy."""
    shape = build(config["data"], "data", config["allowed_targets"]).image_shape
    parts = Parts.of(config, device="meta")
    with torch.device("meta"):
        x, c_noise, condition = torch.zeros(2, *shape), torch.zeros(2), parts.conditioning.examples(2)
        return count_flops(lambda: parts.network(x, c_noise, parts.conditioning(condition))) / 2


def measure(config: Mapping[str, Any], world: processes.World, steps: int, warmup: int) -> dict[str, Any]:
    """The report. All ranks must call it."""
    rank.quiet()
    progress, allowed = rank.progress_of(config), config["allowed_targets"]
    settings, strategy = (build(config[name], name, allowed) for name in ("trainer", "strategy"))
    layout = Layout(progress.batch_size, world.size, world.rank, settings.accumulate_grad_batches)
    data = build(config["data"], "data", allowed)
    loader = data.loader(layout, progress.seed, progress.lanes, 0, warmup + steps)
    loader = TimedLoader(LookingAhead(loader, layout.micro_batches))
    with tempfile.TemporaryDirectory() as folder:
        module = rank.module_of(config, progress, settings.device())
        watch = Stopwatch(loader, TimedUpdate(ema.approach), module.model.dtype)
        trainer = settings.build(
            strategy, world.nodes, world.local_size, world.environment(), warmup + steps, [watch], [], Path(folder)
        )
        with mock.patch.object(ema, "approach", watch.update):
            trainer.fit(module, loader)
    return report(config, watch, str(trainer.strategy.root_device), world.size, warmup)


def report(config: Mapping[str, Any], watch: Stopwatch, device: str, ranks: int, warmup: int) -> dict[str, Any]:
    """All that is known, in base units."""
    seconds = seconds_between(watch.marks[warmup - 1 :])
    averaging = [seconds_between(pair)[0] for pair in watch.update.marks[watch.updates[warmup - 1] :]]
    origin, forward = rank.provenance(config, device), forward_flops(config)
    achieved = TRAINING * forward * config["batch_size"] / float(np.median(seconds))
    sheet = next((rate for name, rate in DATASHEET.items() if name in origin["device"]), None)
    return {
        "images_per_second": spread([config["batch_size"] / s for s in seconds]),
        "seconds_per_step": spread(seconds),
        "data_wait_share": (watch.waits[-1] - watch.waits[warmup - 1]) / sum(seconds),
        "ema_share": sum(averaging) / sum(seconds),
        "forward_flops_per_image": forward,
        "achieved_flops_per_second": achieved,
        "measured_peak_flops_per_second": watch.peak,
        "measured_mfu": achieved / watch.peak,
        "datasheet_mfu": sheet and achieved / (sheet * ranks),
        "peak_memory_bytes": watch.memory,
        "parameters": sum(shape.numel() for shape in parameter_shapes(config).values()),
        **{name: config[name] for name in ("name", "strategy", "trainer", "batch_size")},
        **{name: origin[name] for name in ("device", "versions")},
        "precision": "bf16" if watch.dtype == torch.bfloat16 else "fp32",
        "processes": ranks,
        "threads": torch.get_num_threads(),
        "steps": len(seconds),
        "warmup": warmup,
        "load_average": watch.load_average,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    return dict(zip(names, np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist(), strict=True))


def table(r: Mapping[str, Any]) -> str:
    """The report, for a person."""
    rate, strategy = r["images_per_second"], r["strategy"]
    step = {name: 1000 * seconds for name, seconds in r["seconds_per_step"].items()}
    where = strategy["_target_"].rsplit(".", 1)[-1] + (f"-{strategy['stage']}" if "stage" in strategy else "")
    peak, sheet = r["measured_peak_flops_per_second"] / 1e12, r["datasheet_mfu"]
    return "\n".join([
        f"{r['name']}: {r['parameters'] / 1e6:.2f} M parameters, {TRAINING} x {r['forward_flops_per_image'] / 1e9:.3g} "
        f"GFLOP an image; {r['steps']} steps after {r['warmup']} to warm up",
        f"  images/s        {rate['median']:10,.1f}  quartiles {rate['lower_quartile']:,.1f} to "
        f"{rate['upper_quartile']:,.1f}, all {rate['min']:,.1f} to {rate['max']:,.1f}",
        f"  ms a step       {step['median']:10,.2f}  quartiles {step['lower_quartile']:,.2f} to "
        f"{step['upper_quartile']:,.2f}, all {step['min']:,.2f} to {step['max']:,.2f}",
        f"  waiting for data{r['data_wait_share']:10.1%}  of the time",
        f"  averages        {r['ema_share']:10.1%}  of the time",
        f"  MFU             {r['measured_mfu']:10.1%}  of {peak:,.3g} TFLOP/s, what {r['precision']} matrix products "
        f"reach here on {r['processes']} x {r['threads']} processes x threads at once",
        *([] if sheet is None else [f"                  {sheet:10.1%}  of the datasheet's dense bf16 peak"]),
        f"  peak memory     {r['peak_memory_bytes'] / 2**20:6,.0f} MiB  of the largest process",
        f"  {r['device']}, torch {r['versions']['torch']}, {where}, {r['processes']} x {r['threads']} "
        f"processes x threads, {r['precision']}, batch {r['batch_size']}, load average {r['load_average']:.1f}",
    ])  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    accept_interrupt()
    options = read(arguments)
    config, world = load("train", options.overrides, TrainConfig), processes.current()
    strategy, trainer = (build(config[name], name, config["allowed_targets"]) for name in ("strategy", "trainer"))
    count = world.size if world else trainer.local_processes(strategy)
    if world is None or world.rank == 0:
        check(config, count)
    if world is None and count > 1:
        with tempfile.TemporaryDirectory() as logs:
            return processes.spawn([str(Path(__file__).resolve()), *arguments], count, Path(logs))
    result = measure(config, world or processes.World(0, 1, 1, False), options.steps, options.warmup)
    if world is None or world.rank == 0:
        print(table(result))
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def read(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="group=option and key=value, as for diffusion-trainer train")
    parser.add_argument("--steps", type=int, default=50, help="that are measured (default: 50)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them (default: 10)")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options = parser.parse_intermixed_args(arguments)
    if options.steps < 1 or options.warmup < 1:
        raise UserError(f"--steps {options.steps} and --warmup {options.warmup} must be positive")
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.absolute().parent}")
    return options


def check(config: dict[str, Any], ranks: int) -> None:
    """UserError for what can be known to fail before a process is started."""
    sizes(config, ranks)
    data = build(config["data"], "data", config["allowed_targets"])
    check_data(config, data)
    check_network(config, data.image_shape)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
