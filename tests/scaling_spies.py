"""A callback that sets a run's loss scale and writes down what became of it, named through allowed_targets."""

import json

import torch
from spies import Spy

from diffusion_trainer.callbacks.run import RunCallback
from diffusion_trainer.training.checkpoints import WEIGHT
from diffusion_trainer.training.ema import KEY

KINDS = (WEIGHT, KEY, "exp_avg", "exp_avg_sq")


class Scales(RunCallback):
    """<folder>/scales-<rank>-<started at>.json: of each step whether it was kept, and the scale after it.

    At `at` images seen the scale is set to `scale`. A step that is not kept must leave every bit of weights, average
    and moments; the average must have its closed form over the others.
    """

    def __init__(self, at: int, scale: float, good_steps: float = 0.0):
        self.at, self.scale, self.good_steps = at, scale, good_steps

    def start(self) -> None:
        self.spy, self.seen = Spy(), []
        self.spy.run = self.run
        self.began = self.run.images_seen
        self.before = {kind: self.spy.whole(kind) for kind in KINDS} if self.began else {}
        self.average = self.spy.whole(KEY if self.began else WEIGHT)
        self.set()

    def set(self) -> None:
        if self.run.images_seen == self.at:
            self.run.module.loss_scale.load_state({"scale": self.scale, "good_steps": self.good_steps})

    def after_step(self, previous: int) -> None:
        run = self.run
        kept, state = float(run.module.nonfinite.kept), run.module.loss_scale.state()
        self.seen.append([previous, kept, state["scale"], state["good_steps"]])
        now = {kind: self.spy.whole(kind) for kind in KINDS}
        if kept:
            decay = run.module.ema.tracks[KEY].decay(previous, run.module.progress.batch_size)
            self.average = {n: decay * e + (1 - decay) * now[WEIGHT][n] for n, e in self.average.items()}
        else:
            assert all(torch.equal(now[kind][n], self.before[kind][n]) for kind in KINDS for n in now[kind])
        assert max(float((now[KEY][n] - e).abs().max()) for n, e in self.average.items()) < 1e-6
        self.before = now
        self.set()

    def on_train_end(self, trainer, module) -> None:
        rank = self.run.agreement.rank
        (self.run.folder / f"scales-{rank}-{self.began}.json").write_text(json.dumps(self.seen))
