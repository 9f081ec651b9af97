"""A callback that sets a run's loss scale and writes down what became of it, named through allowed_targets."""

import json

from diffusion_trainer.callbacks.run import RunCallback


class Scales(RunCallback):
    """<folder>/scales-<rank>-<started at>.json: of each step whether it was kept, and the scale after it.

    At `at` images seen the scale is set to `scale`. (What a step that is not kept must leave is held by Spy.)
    """

    def __init__(self, at: int, scale: float, good_steps: float = 0.0):
        self.at, self.scale, self.good_steps = at, scale, good_steps

    def start(self) -> None:
        self.seen, self.began = [], self.run.images_seen
        self.set()

    def set(self) -> None:
        if self.run.images_seen == self.at:
            self.run.module.loss_scale.load_state({"scale": self.scale, "good_steps": self.good_steps})

    def after_step(self, previous: int) -> None:
        run = self.run
        kept, state = float(run.module.nonfinite.kept), run.module.loss_scale.state()
        self.seen.append([previous, kept, state["scale"], state["good_steps"]])
        self.set()

    def on_train_end(self, trainer, module) -> None:
        rank = self.run.agreement.rank
        (self.run.folder / f"scales-{rank}-{self.began}.json").write_text(json.dumps(self.seen))
