"""What the callbacks of one run share."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from lightning.pytorch import Callback, Trainer

from diffusion_trainer.callbacks.job_starts import remove_stop_files, stop_files
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.evaluation import Prepared
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.module import DiffusionModule
from diffusion_trainer.training.sharding import Sharding

STOP_SECONDS = 3.0  # between two looks for the files that say so, each a request to what may be a network file system
DISK = "disk"  # the title of alerts about it
SAVE_TIMEOUT_SECONDS = 3600  # that ranks wait for the slowest to write or read a checkpoint
FIRST, BEFORE_SAVE, SAVE, AFTER_SAVE, LAST = range(5)  # turns of callbacks


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
    saved_at: int = 0  # images of the newest checkpoint; the run begins with what is on the disk, or with no step
    stop_signal: int | None = None  # that this rank has received
    save: Callable[[], None] = lambda: None  # a checkpoint now: for all ranks at once
    settle: Callable[[], None] = lambda: None  # waits until what was to be saved is on the disk
    stopping: bool = False  # whether the training ends after this step
    beat: Callable[..., None] = lambda doing, allowed_seconds=0.0: None  # a sign of life (see Heartbeat)
    failure: UserError | None = None  # why it has not come to its end, raised once all callbacks have had their turn
    rolled_back: bool = False  # it does because the run goes back to an earlier checkpoint
    aside_seconds: float = 0.0  # spent on evaluation and checkpoints, not on training
    save_seconds: float | None = None  # that writing the last checkpoint took
    reach_images: int = 0  # how far back from the newest checkpoint there must be one
    _failing: set[str] = field(default_factory=set)  # what could not be written the last time
    _looked_at: float = -inf  # for the files that tell it to stop, by this rank's clock
    _by_file: bool = False  # whether one is why this rank stops
    _answers: tuple[int, Mapping["RunCallback", list[float]]] = (-1, {})

    @property
    def first(self) -> bool:
        return self.agreement.rank == 0

    @property
    def images_seen(self) -> int:
        return self.module.images_seen

    def told_to_stop(self) -> bool:
        """Whether this rank is: by a signal or, rank 0, by one of `stop_files`, looked for every STOP_SECONDS. The
        others learn it by agreement.
        """
        if self.stop_signal is None and self.first and monotonic() - self._looked_at >= STOP_SECONDS:
            self._looked_at = monotonic()
            if any(path.exists() for path in stop_files(self.folder)):
                self.stop_signal, self._by_file = signal.SIGTERM, True
        return self.stop_signal is not None

    def stop(self) -> None:
        """Ends the training, saved, after this step. All ranks must call it, once one of them is told to stop."""
        self.save()
        self.agree_on_stop()
        self.stopping = self.trainer.should_stop = True
        if self._by_file:
            remove_stop_files(self.folder)

    def agree_on_stop(self) -> None:
        """The same signal on all ranks, if any has one. All ranks must call it."""
        signals = self.agreement.gather(self.stop_signal)
        self.stop_signal = max((s for s in signals if s is not None), default=None)

    def answer(self, callback: "RunCallback") -> list[float]:
        """The means over the ranks of what the callback's `ask` says after this step.

        One reduction a step for all callbacks: the first one that wants its answer asks for all. All ranks must want.
        """
        at, answers = self._answers
        if at != self.images_seen:
            asked = {c: list(c.ask()) for c in self.trainer.callbacks if isinstance(c, RunCallback)}
            means = iter(self.agreement.mean([number for numbers in asked.values() for number in numbers]))
            answers = {c: [next(means) for _ in numbers] for c, numbers in asked.items()}
            self._answers = self.images_seen, answers
        return answers[callback]

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self.first:
            print(text, flush=True)

    def alert(self, title: str, text: str) -> None:
        """What somebody should know who does not watch: a line here, and an alert where a logger has such."""
        self.say(f"  WARNING: {text}")
        if self.first:
            for logger in self.trainer.loggers:
                logger.alert(title, text)

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Around writing what is kept in memory until it is written: a disk that is full, or fails, is an alert, one
        until it works again, and training goes on.
        """
        try:
            yield
        except OSError as error:
            if what not in self._failing:
                self.alert(DISK, f"{what} cannot be written now: {error}; it is when there is room")
            self._failing.add(what)
        else:
            self._failing.discard(what)

    def log(self, metrics: Mapping[str, float], images_seen: int | None = None) -> None:
        """To every logger, at so many images, by default those seen until now. Rank 0 does it alone."""
        at = self.images_seen if images_seen is None else images_seen
        if self.first:
            for logger in self.trainer.loggers:
                with self.going_on(f"the {logger.name} log"):
                    logger.log_metrics({"images_seen": at, **metrics}, step=at)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that does not count as training."""
        start = monotonic()
        yield
        self.aside_seconds += monotonic() - start


class RunCallback(Callback):
    """A callback that acts on a run after optimizer steps.

    turn: when it comes, whatever the order of conf/callbacks (see `in_turn`). FIRST changes what the others see;
    BEFORE_SAVE: what it knows of a step belongs in the checkpoint of that step.
    """

    run: Run  # set by the entry point before the first step
    turn: int = AFTER_SAVE
    attempt: int | None = None  # the number of this start, set by the entry point before `setup`

    def start(self) -> None:
        """Once, before the first step; the module may have been resumed."""

    def after_step(self, previous: int) -> None:
        """After each optimizer step; `previous` images had been seen before it."""

    def ask(self) -> Sequence[float]:
        """After each optimizer step, before any callback's `after_step` has its `run.answer(self)`: always as many."""
        return ()

    def before_save(self) -> None:
        """Before each checkpoint, on all ranks: what it keeps of this callback must be in the run's state. The turn of
        such a callback must be before SAVE, or the checkpoint lacks what the step has added.
        """

    def catch_up(self) -> None:
        """Before each checkpoint, on rank 0: writes what a full disk has kept back, if there is room now."""

    def close(self) -> None:
        """Once, at the end of a run that did not fail, when the loggers have written what they had to."""

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        self.start()

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.after_step(module.images_seen - module.progress.batch_size)


def in_turn(callbacks: Sequence[Callback]) -> list[Callback]:
    """In the order in which they must see a step; those of the same turn as they are given. Lightning's own, which know
    of no run, come after the save.
    """
    return sorted(callbacks, key=lambda callback: callback.turn if isinstance(callback, RunCallback) else AFTER_SAVE)


def crossed(previous: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (previous, now]."""
    return now // every > previous // every
