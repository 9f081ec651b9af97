"""The loss scale of a float16 run goes on where its checkpoint left it."""

from diffusion_trainer.callbacks.run import BEFORE_SAVE, RunCallback

KEY = "loss_scale"  # in the run's state


class Scaling(RunCallback):
    """Only for runs that have one. (The module changes it after each step.)"""

    turn = BEFORE_SAVE

    def start(self) -> None:
        if KEY in self.run.state:
            self.run.module.loss_scale.load_state(self.run.state[KEY])

    def before_save(self) -> None:
        self.run.state[KEY] = self.run.module.loss_scale.state()
