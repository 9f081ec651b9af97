"""What the doctor must know of the run that is to be: sizes in bytes, and where it writes."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import dtype_of, parameter_shapes
from diffusion_trainer.apps.processes import World
from diffusion_trainer.apps.train import processes_of
from diffusion_trainer.callbacks.checkpointing import Checkpointing
from diffusion_trainer.callbacks.ema_snapshots import EmaSnapshots, lengths
from diffusion_trainer.streaming.base import Data
from diffusion_trainer.streaming.loader import Layout, Loader
from diffusion_trainer.training.strategies import Zero

LOGS = "logs"  # in a run's folder; a run may begin in a folder that has it


@dataclass(frozen=True)
class Run:
    """Each property raises the UserError that `train` would raise."""

    config: Mapping[str, Any]
    world: World | None  # the doctor's processes
    processes: int | None  # the run's, if they are to be others

    @property
    def folder(self) -> Path:
        return Path(self.config["folder"])

    def part(self, name: str) -> Any:
        return build(self.config[name], name, self.config["allowed_targets"])

    @property
    def nodes(self) -> int:
        return self.world.nodes if self.world else 1

    @cached_property
    def size(self) -> int:
        """Processes of the run."""
        world = self.world
        if self.processes:
            world = World(0, self.processes, self.nodes, False)
        return processes_of(dict(self.config), world)[1]

    @property
    def local_size(self) -> int:
        return -(-self.size // self.nodes)

    @cached_property
    def data(self) -> Data:
        return self.part("data")

    @property
    def gpu(self) -> bool:
        """Whether this process would train on one (accelerator=cuda without one is the configuration's to refuse)."""
        return self.config["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available()

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.config["precision"], "cuda" if self.gpu else "cpu")

    @property
    def devices(self) -> list[torch.device]:
        """Those that this process measures: its own, or all of the node where it is the node's only process."""
        if not self.gpu:
            return [torch.device("cpu")]
        count, world = torch.cuda.device_count(), self.world
        alone = world is None or world.local_size == 1
        return [torch.device("cuda", i) for i in (range(count) if alone else [world.rank % world.local_size % count])]

    @cached_property
    def loader(self) -> Loader:
        """Of rank 0."""
        c = self.config
        layout = Layout(c["batch_size"], self.size, 0, c["trainer"]["accumulate_grad_batches"])
        return self.data.loader(layout, c["seed"], c["lanes"], 0, 1)

    @cached_property
    def parameters(self) -> int:
        return sum(shape.numel() for shape in parameter_shapes(self.config).values())

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 weights, Adam's two moments, the averages: those of all ranks, whatever the stage."""
        return 4 * self.parameters * (3 + len(self.part("ema").tracks))

    @property
    def sharded(self) -> bool:
        """Whether each rank writes a part of a checkpoint, and not the first one all of it."""
        return isinstance(self.part("strategy"), Zero)

    @property
    def kept_bytes(self) -> int:
        """The checkpoints that are kept, and the one that is being written."""
        callbacks = self.part("callbacks").values()
        return sum((c.keep + 1) * self.checkpoint_bytes for c in callbacks if isinstance(c, Checkpointing))

    @property
    def snapshot_bytes(self) -> int:
        """All snapshots of averages to the end."""
        each, count = 4 * self.parameters * len(lengths(self.part("ema"))), self.config["num_images"]
        callbacks = self.part("callbacks").values()
        return sum((count // c.every_n_images + 1) * each for c in callbacks if isinstance(c, EmaSnapshots))

    @property
    def host_bytes(self) -> int:
        """Of a node's memory: batches on their way, what is copied to be saved, and on a CPU the model's state."""
        state = self.checkpoint_bytes // (self.nodes if self.sharded else 1)  # of a node
        strategy = self.part("strategy")
        total = self.local_size * self.loader.ring_bytes + state
        if not self.gpu:
            gradients_and_weights = 8 * self.parameters * self.local_size
            total += gradients_and_weights + (state if self.sharded else state * self.local_size)
        elif isinstance(strategy, Zero) and strategy.offload_optimizer:
            total += state + 4 * self.parameters // self.nodes
        return total


def nearest(folder: Path) -> Path:
    """It, or the first above it that there is."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder of a moment on the file system that a run in `folder` writes to. A kill leaves it where it does not keep
    a run from beginning there.
    """
    at = nearest(folder)
    if at == folder.absolute():
        at = at / LOGS
        at.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=at) as path:
        yield Path(path)
