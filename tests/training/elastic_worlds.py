"""A world of test_elastic_matrix: its processes train and save a model at every stage of ZeRO, then load what every
world has saved.

    python elastic_worlds.py FOLDER    as a rank (apps.processes.spawn starts them)
"""

import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusion_trainer.apps import processes, rank
from diffusion_trainer.training import checkpoints
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint
from diffusion_trainer.training.ema import KEY, attach_ema
from diffusion_trainer.training.nonfinite import NonFinite
from diffusion_trainer.training.optimizers import AdamW, Constant
from diffusion_trainer.training.sharding import Sharding
from diffusion_trainer.training.strategies import Ddp, Single, Strategy, Zero
from diffusion_trainer.training.trainer import TrainerSettings

WORLDS, STAGES = (1, 2, 4), (0, 1, 2, 3)
LAYOUTS = [f"{ranks} x stage {stage}" for ranks in WORLDS for stage in STAGES]
KINDS = (WEIGHT, "exp_avg", "exp_avg_sq", KEY, f"{KEY}.short")
IMAGES, STEPS, WAIT_SECONDS = 8, 3, 400


def strategy_of(ranks: int, stage: int) -> Strategy:
    return Zero(stage) if stage else Ddp() if ranks > 1 else Single()


class Toy(LightningModule):
    """Two groups of parameters, of sizes that no number of ranks divides, on made-up data."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 5))
        self.loss = 0.0

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        loss = (self.model(x) - x[:, :5].sin()).square().mean()
        self.loss = loss.item()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = AdamW(0.01, Constant(), weight_decay=0.1).build(self.model)
        attach_ema(optimizer, {KEY: lambda: 0.9, f"{KEY}.short": lambda: 0.5}, NonFinite(optimizer))
        return optimizer


def gathered(sharding: Sharding, agreement: Agreement) -> dict[str, dict[str, Tensor]]:
    """By kind and parameter, flat, from the ranks' runs of elements."""
    out: dict[str, dict[str, Tensor]] = {}
    for kind in KINDS:
        mine = []
        for name, first, count, master, at in sharding.slots():
            source = master.data if kind == WEIGHT else sharding.optimizer.state[master][kind]
            mine.append((name, first, source.reshape(-1)[at : at + count].clone()))
        ranks = sorted((run for runs in agreement.gather(mine) for run in runs), key=lambda run: run[:2])
        unique = {(name, first): run for name, first, run in ranks}
        names = dict.fromkeys(name for name, _ in unique)
        out[kind] = {n: torch.cat([run for (name, _), run in unique.items() if name == n]) for n in names}
    return out


class Watch(Callback):
    """Once the strategy stands: the ranks' agreement and sharding."""

    def __init__(self, strategy: Strategy):
        self.strategy = strategy

    def on_train_start(self, trainer, module) -> None:
        self.agreement, self.sharding = Agreement(), self.strategy.sharding(module.model, trainer)

    def gather(self) -> dict[str, dict[str, Tensor]]:
        return gathered(self.sharding, self.agreement)


class Saves(Watch):
    """After the last step: <folder>/<layout>/, and what the ranks hold in <layout>.pt."""

    def __init__(self, strategy: Strategy, folder: Path, layout: str):
        super().__init__(strategy)
        self.folder, self.layout = folder, layout

    def on_train_end(self, trainer, module) -> None:
        checkpoints.save(self.folder / self.layout, STEPS * IMAGES, self.sharding, {}, self.agreement, 1)
        content = self.gather()
        if self.agreement.rank == 0:
            write(content, self.folder / f"{self.layout}.pt")


class Loads(Watch):
    """At each step goes on from another layout's checkpoint. `found`: what it then holds, the loss, and the weights
    after the step.
    """

    def __init__(self, strategy: Strategy, folder: Path):
        super().__init__(strategy)
        self.folder, self.found = folder, {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
        folder = self.folder / LAYOUTS[batch_idx]
        checkpoint = Checkpoint(checkpoints.latest(folder))
        checkpoints.load(checkpoint, self.sharding)
        self.loaded = self.gather()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        loss = self.agreement.mean([module.loss])[0]
        self.found[LAYOUTS[batch_idx]] = {"loaded": self.loaded, "loss": loss, "after": self.gather()}


def write(content: object, file: Path) -> None:
    torch.save(content, file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)


def images(seed: int, world: processes.World) -> Tensor:
    """This rank's of a batch."""
    whole = torch.randn(IMAGES, 7, generator=torch.Generator().manual_seed(seed))
    return whole.chunk(world.size)[world.rank]


def fit(watch: Watch, seed: int, batches: Iterable[Tensor], folder: Path, world: processes.World) -> None:
    batches = list(batches)
    settings = TrainerSettings(accelerator="cpu", processes=world.size, gradient_clip_norm=0.5)
    trainer = settings.build(
        watch.strategy, 1, world.size, world.environment(), len(batches), [watch], [], folder
    )  # fmt: skip
    trainer.fit(Toy(seed), DataLoader(batches, batch_size=None))


def wait_for(files: list[Path]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while missing := [file.name for file in files if not file.exists()]:
        if time.monotonic() > end:
            raise TimeoutError(f"no {missing}")
        time.sleep(0.1)


def main(folder: Path) -> None:
    rank.quiet()
    torch.set_num_threads(1)
    world = processes.current()
    for stage in STAGES:
        layout = f"{world.size} x stage {stage}"
        seed = LAYOUTS.index(layout)
        batch = partial(images, world=world)
        batches = [batch(100 * seed + step) for step in range(STEPS)]
        fit(Saves(strategy_of(world.size, stage), folder, layout), seed, batches, folder, world)
    wait_for([folder / f"{layout}.pt" for layout in LAYOUTS])
    for stage in STAGES:
        loads = Loads(strategy_of(world.size, stage), folder)
        fit(loads, 99, [images(9999, world) for _ in LAYOUTS], folder, world)
        if world.rank == 0:
            write(loads.found, folder / f"found by {world.size} x stage {stage}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
