"""A callback that fails, named in a configuration through allowed_targets."""

import os

from diffusion_trainer.callbacks.run import RunCallback


class Crash(RunCallback):
    """RuntimeError once the run has seen so many images, on the last rank; in all starts of its job or in one."""

    def __init__(self, images: int, start: int | None = None):
        self.images = images
        self.due = start in (None, int(os.environ.get("SLURM_RESTART_COUNT", 0)))

    def after_step(self, previous: int) -> None:
        run = self.run
        if self.due and run.images_seen >= self.images and run.agreement.rank == run.agreement.world - 1:
            raise RuntimeError("crash of the test")
