"""Loss, learning rate and throughput, to the loggers and as a line on the screen."""

from time import monotonic

import torch
from torch import Tensor

from diffusion_trainer.callbacks.run import BEFORE_SAVE, RunCallback, crossed

KEY = "metrics"  # in the run's state


class LogMetrics(RunCallback):
    """Every `every_n_images`: means over the images since the last time and over the ranks, restarts or not."""

    turn = BEFORE_SAVE

    def __init__(self, every_n_images: int):
        if every_n_images < 1:
            raise ValueError(f"every_n_images must be positive, not {every_n_images}")
        self.every_n_images = every_n_images

    def start(self) -> None:
        self._begin()
        if kept := self.run.state.get(KEY):
            self._sums, self._steps = self._mine(torch.tensor(kept["sums"])), kept["steps"]

    def _mine(self, sums: Tensor) -> Tensor:
        """(ranks, 2) -> (2,) of this rank: bitwise on as many ranks as there were, else of all of them the mean."""
        agreement = self.run.agreement
        return sums[agreement.rank] if len(sums) == agreement.world else sums.mean(0)

    def before_save(self) -> None:
        self.run.state[KEY] = {"sums": self.run.agreement.gather(self._sums.tolist()), "steps": self._steps}

    def _begin(self) -> None:
        self._since, self._aside, self._images = monotonic(), self.run.aside_seconds, self.run.images_seen
        self._sums, self._steps = torch.zeros(2), 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        terms = module.last_terms
        # Summed on the device and read only when it is logged: no step waits for it.
        means = torch.stack([terms.loss.mean(), terms.error.mean()]) / trainer.accumulate_grad_batches
        self._sums = self._sums.to(means.device) + means
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def after_step(self, previous: int) -> None:
        run = self.run
        self._steps += 1
        total = run.module.progress.num_images
        if not crossed(previous, run.images_seen, self.every_n_images) and run.images_seen < total:
            return
        loss, error = run.agreement.mean((self._sums / self._steps).tolist())
        seconds = monotonic() - self._since - (run.aside_seconds - self._aside)
        rate = (run.images_seen - self._images) / seconds
        metrics = {
            "train/loss": loss,
            "train/error": error,
            "train/learning_rate": run.module.learning_rate,
            "train/images_per_second": rate,
        }
        if run.save_seconds is not None:
            metrics["train/save_seconds"] = run.save_seconds
        run.log(metrics)
        left = (total - run.images_seen) / rate
        run.say(
            f"  {run.images_seen:>10,} of {total:,} images ({run.images_seen / total:4.0%})   loss {loss:.4f}   "
            f"{rate:,.0f} images/s   {int(left // 60)}:{int(left % 60):02d} left"
        )
        self._begin()
