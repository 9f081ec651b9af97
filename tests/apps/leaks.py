"""A callback that says all it knows and breaks, for the test of secrets: named through allowed_targets."""

import os
import sys

from diffusion_trainer.callbacks.run import RunCallback


class Leak(RunCallback):
    """Prints the variables after each step, and ends with an error about them once `at` images have been seen."""

    def __init__(self, variables: list[str], at: int):
        self.variables, self.at = variables, at

    def after_step(self, previous: int) -> None:
        for name in self.variables:
            print(f"{name} is {os.environ[name]}", flush=True)
            print(f"{name} is {os.environ[name]}", file=sys.stderr)
        if self.run.images_seen == self.at:
            raise RuntimeError(f"no answer from https://user:{os.environ['STORE_PASSWORD']}@host/x.tar")
