"""What the callbacks of one run share."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from lightning.pytorch import Callback, Trainer

from diffusion_trainer.callbacks.loggers import alert
from diffusion_trainer.evaluation.evaluation import Prepared
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.module import DiffusionModule
from diffusion_trainer.training.sharding import Sharding


@dataclass
class Run:
    """One rank's view of a run: its folder, what ranks agree through, and where the weights live."""

    folder: Path
    module: DiffusionModule
    trainer: Trainer
    agreement: Agreement
    sharding: Sharding
    generator: Callable[[], Generator]  # of the weights as they are when it is called
    evaluation: Prepared | None
    state: dict[str, Any] = field(default_factory=dict)  # saved with each checkpoint
    stop_signal: int | None = None  # that this rank has received
    save: Callable[[], None] | None = None  # a checkpoint now: for all ranks at once
    settle: Callable[[], None] = lambda: None  # waits until what was to be saved is on the disk
    stop: Callable[[], None] | None = None  # ends the training, saved, after this step: for all ranks at once
    stopping: bool = False  # whether the training ends after this step
    rolled_back: bool = False  # it does because the run goes back to an earlier checkpoint
    aside_seconds: float = 0.0  # spent on evaluation and checkpoints, not on training

    @property
    def first(self) -> bool:
        return self.agreement.rank == 0

    @property
    def images_seen(self) -> int:
        return self.module.images_seen

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self.first:
            print(text, flush=True)

    def alert(self, title: str, text: str) -> None:
        """What somebody should know who does not watch: a line here, and an alert where a logger has such."""
        self.say(f"  WARNING: {text}")
        if self.first:
            for logger in self.trainer.loggers:
                alert(logger, title, text)

    def log(self, metrics: Mapping[str, float]) -> None:
        """To every logger, at images seen. Rank 0 does it alone."""
        if self.first:
            for logger in self.trainer.loggers:
                logger.log_metrics({"images_seen": self.images_seen, **metrics}, step=self.images_seen)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that does not count as training."""
        start = monotonic()
        yield
        self.aside_seconds += monotonic() - start


class RunCallback(Callback):
    """A callback that acts on a run after optimizer steps."""

    run: Run  # set by the entry point before the first step

    def start(self) -> None:
        """Once, before the first step; the module may have been resumed."""

    def after_step(self, previous: int) -> None:
        """After each optimizer step; `previous` images had been seen before it."""

    def before_save(self) -> None:
        """Before each checkpoint, on all ranks: what it keeps of this callback must be in the run's state."""

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        self.start()

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.after_step(module.images_seen - module.progress.batch_size)


def crossed(previous: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (previous, now]."""
    return now // every > previous // every
