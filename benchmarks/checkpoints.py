"""How long saving holds up training: `python benchmarks/checkpoints.py --millions 16 --rounds 7 --folder /somewhere`.

torch.save of weights, average and moments, without waiting for the disk, against Saver: the copy that training waits
for, and all of it until the checkpoint is on the disk and read back. And how long a start takes to read it, with its
checksums, from the page cache: all that one process wrote, and, as one of two ranks would, a half of each parameter of
that. In turns; medians and quartiles.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch

from diffusion_trainer.training import checkpoints
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.resuming import resumable
from diffusion_trainer.training.saving import Saver
from diffusion_trainer.training.sharding import Replicated, Slot
from diffusion_trainer.training.snapshots import Snapshots

KINDS = ("ema", "exp_avg", "exp_avg_sq")


def model_of(millions: float) -> Replicated:
    """Square layers of a million parameters, with the state of Adam and one average."""
    layers = [torch.nn.Linear(1000, 1000, bias=False) for _ in range(round(millions))]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {kind: torch.randn_like(p) for kind in KINDS} | {"step": torch.tensor(1.0)}
    return Replicated(model, optimizer)


class Half(Replicated):
    """What the first of two ranks holds."""

    def slots(self) -> Iterator[Slot]:
        return (slot._replace(count=slot.count // 2) for slot in super().slots())


def load(root: Path, sharding: Replicated) -> None:
    checkpoints.load(resumable(root, Agreement()).checkpoint, sharding)


def seconds(work) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def say(name: str, times: list[float], against: float) -> None:
    low, middle, high = statistics.quantiles(times, n=4)
    print(f"{name:42} {middle:7.3f} s ({low:.3f} to {high:.3f})   {middle / against:5.2f} of torch.save")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("."))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    sharding = model_of(options.millions)
    state = {"model": sharding.model.state_dict(), "optimizer": sharding.optimizer.state_dict()}
    cold = seconds(lambda: Snapshots(sharding, 0).take(0, {}))
    saver = Saver(folder / "checkpoints", sharding, Agreement(), 2)
    saver.reserve()
    saver.wait()
    theirs, blocked, whole, loaded, half = [], [], [], [], []
    part = Half(sharding.model, sharding.optimizer)
    for i in range(options.rounds):
        theirs.append(seconds(lambda: torch.save(state, folder / "theirs.pt")))
        blocked.append(seconds(lambda i=i: saver.begin(i, {})))
        whole.append(blocked[-1] + seconds(saver.wait))
        loaded.append(seconds(lambda: load(folder / "checkpoints", sharding)))
        half.append(seconds(lambda: load(folder / "checkpoints", part)))
    usual = statistics.median(theirs)
    say("torch.save", theirs, usual)
    say("training waits", blocked, usual)
    say("until it is on the disk and read back", whole, usual)
    say("copying to memory that was not reserved", [cold, cold], usual)
    say("reading it at a start", loaded, usual)
    say("reading a half of each parameter of it", half, usual)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
