"""Callbacks that hit a run from inside, at a moment that nobody outside could find, and that slow it down.

Named in a configuration through allowed_targets. `start` counts the starts of a job from 0, as SLURM_RESTART_COUNT.
"""

import os
import signal
import time

from diffusion_trainer.callbacks.run import RunCallback
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.training import saving


def this_start() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


class Hit(RunCallback):
    """The signal, once, to this process, if it is that rank in that start of its job."""

    def __init__(self, sends: str, rank: int, start: int):
        self.number = signal.Signals[sends]
        self.due = rank == int(os.environ["SLURM_PROCID"]) and start == this_start()

    def hit(self) -> None:
        if self.due:
            self.due = False
            os.kill(os.getpid(), self.number)


class InStart(Hit):
    """When the ranks have met, and before any has something to save."""

    def setup(self, trainer, module, stage: str) -> None:
        self.hit()


class InStep(Hit):
    """Between the backward pass and the optimizer's step, once so many images have been seen."""

    def __init__(self, sends: str, rank: int, start: int, images: int):
        super().__init__(sends, rank, start)
        self.images = images

    def on_after_backward(self, trainer, module) -> None:
        if self.run.images_seen >= self.images:
            self.hit()


class InSave(Hit):
    """While a checkpoint is being written, which takes a second then."""

    def start(self) -> None:
        write = saving.write_tensors

        def hit_while_writing(path, tensors):
            if self.due:
                self.hit()
                time.sleep(1)
            return write(path, tensors)

        saving.write_tensors = hit_while_writing


class InEvaluation(Hit):
    """Before the second batch of samples is drawn."""

    def start(self) -> None:
        draw, drawn = Generator.draw, []

        def hit_on_the_way(generator, samples, condition):
            if drawn:
                self.hit()
            drawn.append(len(samples))
            return draw(generator, samples, condition)

        Generator.draw = hit_on_the_way


class AtEnd(Hit):
    """When all is saved and training is over."""

    def on_train_end(self, trainer, module) -> None:
        self.hit()


class SlowWhenStopped(RunCallback):
    """In the first start of a job, a checkpoint that is written because it was told to stop takes so long."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def start(self) -> None:
        write, run = saving.write_tensors, self.run

        def slow(path, tensors):
            if run.stop_signal is not None and this_start() == 0:
                print("writes slowly", flush=True)
                time.sleep(self.seconds)
            return write(path, tensors)

        saving.write_tensors = slow


class Told(RunCallback):
    """<run>/told-<start>-<rank>: the signal that the rank has when it saves to stop, and the images seen until then."""

    def before_save(self) -> None:
        if self.run.stop_signal is not None:
            file = self.run.folder / f"told-{this_start()}-{self.run.agreement.rank}"
            file.write_text(f"{signal.Signals(self.run.stop_signal).name} {self.run.images_seen}")


class Creep(RunCallback):
    """Steps take so long, after the first eight of a start, in so many starts of the job."""

    def __init__(self, seconds: float, starts: int):
        self.seconds, self.creeps, self.steps = seconds, this_start() < starts, 0

    def after_step(self, previous: int) -> None:
        self.steps += 1
        if self.creeps and self.steps > 8:
            time.sleep(self.seconds)
