"""Shows an objective what became of the global batch, the same on all ranks."""

import torch

from diffusion_trainer.callbacks.run import BEFORE_SAVE, RunCallback

KEY = "objective"  # in the run's state


class Observing(RunCallback):
    """After each step, all losses and times of its global batch, in the order of the batch, whoever computed them.

    Only for objectives that adapt to them (importance sampling of t): numbers are read from the device and gathered.
    """

    turn = BEFORE_SAVE

    def start(self) -> None:
        self._seen: list[tuple[int, list[float], list[float]]] = []
        self.run.module.objective.load_state(self.run.state.get(KEY, {}))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        terms = module.last_terms
        unweighted = terms.loss / terms.importance
        self._seen.append((batch["first"], unweighted.tolist(), terms.t.tolist()))
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def after_step(self, previous: int) -> None:
        parts = sorted(part for share in self.run.agreement.gather(self._seen) for part in share)
        loss, t = (torch.tensor([part[i] for part in parts]).T.flatten() for i in (1, 2))  # the pieces take turns
        objective, finite = self.run.module.objective, loss.isfinite()  # a step with others is not taken
        objective.observe(loss[finite], t[finite])
        self.run.state[KEY] = objective.state()
        self._seen = []
