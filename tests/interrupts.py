"""A callback that interrupts a run at a chosen place: for tests, named in a configuration through allowed_targets."""

import os
import time

from diffusion_trainer.callbacks.run import FIRST, RunCallback
from diffusion_trainer.training.checkpoints import Checkpoint, latest


class Interrupt(RunCallback):
    """Sends its last rank a signal at one place: INTERRUPT="<place> <images> <signal> <images that are saved by then>".

    A variable, not an option: the next start has the same configuration. Places are the methods' names.
    """

    turn = FIRST

    def start(self) -> None:
        self.place, *numbers = os.environ.get("INTERRUPT", "nowhere 0 0 0").split()
        self.images, self.number, self.saved = map(int, numbers)
        self.told_to_stop, self.run.told_to_stop = self.run.told_to_stop, self.mid_evaluation

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            self.mid_accumulation()

    def mid_accumulation(self) -> None:
        """A piece of the step's gradient is there, another is not."""
        self.pass_by("mid_accumulation")

    def mid_evaluation(self) -> bool:
        """In the place of run.told_to_stop, which an evaluation asks after each batch that it has drawn."""
        if not self.run.module.training:
            self.pass_by("mid_evaluation")
        return self.told_to_stop()

    def ask(self) -> tuple[()]:
        """A step is taken; no callback has acted on it, nor been asked whether to stop."""
        self.pass_by("ask")
        return ()

    def pass_by(self, place: str) -> None:
        agreement = self.run.agreement
        if (place, self.run.images_seen, agreement.rank) != (self.place, self.images, agreement.world - 1):
            return
        end = time.monotonic() + 60
        while self.saved and self._newest() < self.saved:  # written in the background: else a race says what is lost
            assert time.monotonic() < end, f"{self.saved} images were never saved"
            time.sleep(0.01)
        os.kill(os.getpid(), self.number)

    def _newest(self) -> int:
        found = latest(self.run.folder / "checkpoints")
        return Checkpoint(found).images_seen if found else 0
