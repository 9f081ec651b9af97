"""A callback that fails at every start of a run, named in a configuration through allowed_targets."""

from diffusion_trainer.callbacks.run import RunCallback


class Crash(RunCallback):
    """RuntimeError once the run has seen so many images, on the last rank alone."""

    def __init__(self, images: int):
        self.images = images

    def after_step(self, previous: int) -> None:
        run = self.run
        if run.images_seen >= self.images and run.agreement.rank == run.agreement.world - 1:
            raise RuntimeError("crash of the test")
