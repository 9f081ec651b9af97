"""Checkpoints, and a stop that loses nothing."""

import signal
from types import FrameType

from diffusion_trainer.callbacks.run import RunCallback, crossed
from diffusion_trainer.training import checkpoints


class Checkpointing(RunCallback):
    """A checkpoint every `every_n_images`, at the end, and when SIGINT or SIGTERM reaches any rank.

    The handler only sets a flag. After each step the ranks agree on it; then all save and stop. A second SIGINT stops
    at once. A checkpoint that cannot be written (a full disk) is reported and training goes on. It stands before what
    takes long, evaluation, so that this puts no work at risk.
    """

    def __init__(self, every_n_images: int, keep: int = 2):
        if every_n_images < 1 or keep < 1:
            raise ValueError("every_n_images and keep must be positive")
        self.every_n_images, self.keep = every_n_images, keep

    def start(self) -> None:
        self._saved_at: int | None = None
        self.run.stop, self.run.save = self.stop, self.save
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.run.stop_signal is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.run.stop_signal = number

    def after_step(self, previous: int) -> None:
        run = self.run
        stop = run.agreement.any(run.stop_signal is not None)
        done = run.images_seen >= run.module.progress.num_images
        if stop:
            self.stop()
        elif done or crossed(previous, run.images_seen, self.every_n_images):
            self.save()

    def stop(self) -> None:
        """All ranks must call it, once one of them has received a signal."""
        run = self.run
        if self._saved_at != run.images_seen:
            self.save()
        run.stop_signal = max(s or 0 for s in run.agreement.gather(run.stop_signal))
        run.stopping = run.trainer.should_stop = True

    def save(self) -> None:
        run = self.run
        try:
            with run.aside():
                root, state = run.folder / "checkpoints", run.state
                checkpoints.save(root, run.images_seen, run.sharding, state, run.agreement, self.keep)
            self._saved_at = run.images_seen
        except OSError as error:
            run.say(f"  WARNING: {error}")

    def on_train_end(self, trainer, module) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
