"""Measures what ZeRO keeps on a rank and sends in a step, and compares both with the formulas. CPUs with gloo, Linux.

    python benchmarks/zero.py experiment=digits network.blocks_per_level=12 batch_size=32 [overrides]
                              [--ranks 1,2,4] [--only ddp,zero3] [--json F]

The third step of a run as `diffusion-trainer train` would take it, without callbacks and loggers, is looked at before
every operator. Bytes of memory are those of storages, each once, of the rank with the most. With P parameters and n
ranks, Rajbhandari et al. 2020 ("ZeRO") have (2 + 2 + K) P bytes of weights, gradients and Adam's state (K = 12: master
weights and two moments) in mixed precision (section 3.1), divided as in section 5, and send 2 P elements, or 3 P in
stage 3 (section 7). Our weights and gradients have 4 bytes whatever the precision of the forward pass; without ZeRO the
weights are their own masters; and there is EMA:

stage          0 (ddp)    1          2          3
weights        4 P        4 P        4 P        4 P / n
masters        0          4 P / n    4 P / n    4 P / n    what the optimizer steps
moments        8 P        8 P / n    8 P / n    8 P / n
ema            4 P        4 P / n    4 P / n    4 P / n    times the number of averages
gradients      4 P        4 P        4 P / n    4 P / n
activations    A / n      A / n      A / n      A / n      what autograd keeps; A: measured on one rank, ddp
sent           8 P        8 P        8 P        12 P       times (n - 1) / n

sent       counted where torch dispatches collectives, as rings: (n - 1) / n of the whole tensor for an all-gather or a
           reduce-scatter, twice that for an all-reduce, in the mean once for a broadcast or reduce; mean of the ranks
wire       what the processes' TCP sockets sent (Linux's count)
gloo       the same collectives counted as gloo carries them out: it sends more than rings for a reduce and a
           reduce-scatter (zero_traffic.py), so this is what `wire` should be
buckets    allocated for gradients on their way by DeepSpeed, a constant of its configuration (DDP's hold the gradients)
gathered   the most of stage 3's weights that are whole at a time
other      all other tensors that Python knows of, at the step
tensors    all of the above, at the step; without activations, which are no more
held       what malloc has handed out since before the model was made and not got back (glibc's count), at the step

A second formula ("DeepSpeed") says what differs from the paper. Stage 1 reduces gradients in the backward pass that
ends a step, as stage 2 does: with one micro-batch it holds no more; with several it holds all of them between. Autograd
makes the gradient of a whole parameter before it can go where it belongs: 4 L bytes for the largest, unless a bucket
holds all until the end. Stage 3 gathers weights once a step, not twice, as long as all fit its limits. The rows
"-limits" have limits as a large network meets them: nothing stays gathered, a bucket holds P / 16 gradients.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_step import Parser, check
from zero_probes import Probe

from diffusion_trainer.apps import processes, rank
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import TrainConfig, parameter_shapes
from diffusion_trainer.apps.start import accept_interrupt
from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.loader import Layout

KINDS = ("weights", "masters", "moments", "ema", "gradients", "activations")  # of memory, in the formulas


@dataclass(frozen=True)
class Row:
    """A strategy, perhaps with other limits of DeepSpeed, and what then is to be expected."""

    strategy: str
    stage: int
    sent: int  # P elements x (n-1)/n, by DeepSpeed's design
    limits: bool = False  # as a large network meets them

    def settings(self, parameters: int) -> dict[str, Any]:
        """Of DeepSpeed's zero_optimization."""
        names = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold")
        limits = {**{f"stage3_{name}": 0 for name in names}, "reduce_bucket_size": parameters // 16}
        return limits if self.limits else {}


ROWS = {
    "ddp": Row("ddp", 0, sent=2),
    "zero1": Row("zero1", 1, sent=2),
    "zero2": Row("zero2", 2, sent=2),
    "zero3": Row("zero3", 3, sent=2),
    "zero1-limits": Row("zero1", 1, sent=2, limits=True),
    "zero2-limits": Row("zero2", 2, sent=2, limits=True),
    "zero3-limits": Row("zero3", 3, sent=3, limits=True),
}


def paper(stage: int, ranks: int, parameters: int, averages: int, activations: float) -> dict[str, float]:
    """Bytes of a rank, and bytes it sends. activations: of one rank with the whole global batch."""
    whole, part = 4 * parameters, 4 * parameters / ranks
    return {
        "weights": part if stage == 3 else whole,
        "masters": part if stage else 0,
        "moments": 2 * (part if stage else whole),
        "ema": averages * (part if stage else whole),
        "gradients": part if stage >= 2 else whole,
        "activations": activations / ranks,
        "sent": (3 if stage == 3 else 2) * whole * (ranks - 1) / ranks,
    }


def deepspeed(
    row: Row, ranks: int, parameters: int, averages: int, activations: float, largest: int
) -> dict[str, float]:
    """As `paper`, with what DeepSpeed does otherwise. largest: elements of the largest parameter."""
    whole, result = 4 * parameters, paper(row.stage, ranks, parameters, averages, activations)
    on_the_way = 0 if row.stage in (1, 2) and not row.limits else 4 * largest
    result["gradients"] = (whole / ranks if row.stage else whole) + on_the_way
    return result | {"sent": row.sent * whole * (ranks - 1) / ranks}


def measure(config: Mapping[str, Any], row: Row, world: processes.World) -> dict[str, Any]:
    """Of the third step. All ranks must call it."""
    rank.quiet()
    progress, allowed = rank.progress_of(config), config["allowed_targets"]
    settings, strategy, ema = (build(config[name], name, allowed) for name in ("trainer", "strategy", "ema"))
    numbers = [shape.numel() for shape in parameter_shapes(config).values()]
    parameters, steps = sum(numbers), Probe.AT + 1
    loader = build(config["data"], "data", allowed).loader(
        Layout(progress.batch_size, world.size, world.rank, 1), progress.seed, progress.lanes, 0, steps
    )
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(strategy)
        module = rank.module_of(config, progress, "cpu")
        trainer = settings.build(
            strategy, world.nodes, world.local_size, world.environment(), steps, [probe], [], Path(folder)
        )
        if row.stage:
            trainer.strategy.config["zero_optimization"].update(row.settings(parameters))
        trainer.fit(module, loader)
    return {
        "ranks": world.size, "parameters": parameters, "largest": max(numbers), "averages": len(ema.tracks),
        "memory": probe.memory, "sent": probe.sent, "wire": probe.wire, "gloo": probe.gloo,
    }  # fmt: skip


def compared(name: str, measured: dict[str, Any], activations: float) -> dict[str, Any]:
    """With the formulas beside."""
    row, sizes = ROWS[name], (measured["ranks"], measured["parameters"], measured["averages"], activations)
    ours = deepspeed(row, *sizes, measured["largest"])
    return {"row": name, **measured, "paper": paper(row.stage, *sizes), "deepspeed": ours}


def ratio(measured: float, formula: float) -> float:
    """1 where nothing was expected and nothing is."""
    return measured / formula if formula else float(1 + bool(measured))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The report, for a person."""
    rest = ("wire", "gloo", "buckets", "gathered", "other", "tensors", "held")
    lines = [
        f"P = {rows[0]['parameters']:,}; MB (1e6 bytes), and over the formulas (DeepSpeed's where it differs)",
        f"{'':13}{'n':>2}" + "".join(f"{name:>12}" for name in [*KINDS, "sent"]) + "".join(f"{n:>9}" for n in rest),
    ]
    for r in rows:
        got = {**r["memory"], "sent": sum(r["sent"].values()), "wire": r["wire"], "gloo": r["gloo"]}
        numbers = "".join(f"{got[name] / 1e6:12.2f}" for name in [*KINDS, "sent"])
        lines.append(f"{r['row']:13}{r['ranks']:2}{numbers}" + "".join(f"{got[name] / 1e6:9.2f}" for name in rest))
        for formula in ("paper",) if r["deepspeed"] == r["paper"] else ("paper", "deepspeed"):
            ratios = "".join(f"{ratio(got[name], r[formula][name]):12.4f}" for name in [*KINDS, "sent"])
            lines.append(f"  / {formula:11}{ratios}")
    return "\n".join(lines)


def run(names: Sequence[str], ranks: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """What `measure` says of each, one after another, in processes of their own. UserError if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        arguments = [*overrides, f"--only={','.join(names)}", f"--ranks={ranks}", "--one-rank", f"--json={file}"]
        code = processes.spawn([str(Path(__file__).resolve()), *arguments], ranks, Path(folder))
        if code:
            raise UserError(f"{', '.join(names)} on {ranks} ranks: failed with exit code {code}")
        return json.loads(file.read_text())


def configured(overrides: Sequence[str], name: str, ranks: int) -> dict[str, Any]:
    ours = [f"strategy={ROWS[name].strategy}", "trainer.accelerator=cpu", f"trainer.processes={ranks}",
            "trainer.accumulate_grad_batches=1"]  # fmt: skip
    return load("train", [*overrides, *ours], TrainConfig)


def main(arguments: Sequence[str]) -> int:
    accept_interrupt()
    options = read(arguments)
    if options.one_rank:
        world, results = processes.current(), []
        for name in options.only:
            if world.rank == 0:
                print(f"{name} on {world.size}", file=sys.stderr, flush=True)
            config = configured(options.overrides, name, world.size)
            measure(config, ROWS[name], world)  # what is made once in a process is there when it counts
            results.append(measure(config, ROWS[name], world))
            if world.rank == 0:
                options.json.write_text(json.dumps(results))
        return 0
    for name in options.only:
        for ranks in options.ranks:
            check(configured(options.overrides, name, ranks), ranks)
    whole, rows = run(["ddp"], 1, options.overrides)[0]["memory"]["activations"], []
    for ranks in options.ranks:
        found = run(options.only, ranks, options.overrides)
        rows += [compared(name, row, whole) for name, row in zip(options.only, found, strict=True)]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def read(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="group=option and key=value, as for diffusion-trainer train")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of processes (default: 1,2,4)")
    parser.add_argument("--only", default=",".join(ROWS), help=f"some of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--one-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    options.ranks, options.only = options.ranks.split(","), options.only.split(",")
    if not all(n.isdecimal() and int(n) for n in options.ranks):
        raise UserError(f"--ranks {','.join(options.ranks)}: positive numbers, as 1,2,4")
    options.ranks = [int(n) for n in options.ranks]
    if not set(options.only) <= ROWS.keys():
        raise UserError(f"--only {','.join(options.only)}: some of {', '.join(ROWS)}")
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.absolute().parent}")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
