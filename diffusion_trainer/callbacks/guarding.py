"""Steps that were not taken, a loss that has left its course, and the way back to the last good checkpoint."""

from collections import deque
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from diffusion_trainer.callbacks.ema_snapshots import FOLDER as SNAPSHOTS
from diffusion_trainer.callbacks.run import FIRST, SAVE_TIMEOUT_SECONDS, RunCallback
from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.rollbacks import Rollbacks, before, go_back_to, set_aside_after
from diffusion_trainer.training.saving import order_of

KEY = "guard"  # in the run's state
CHECKPOINTS = "checkpoints"  # folder of a run
TO_DEVIATION = 1.4826  # of a normal law over its median absolute deviation
LEAST_DEVIATION = 1e-3  # of the usual loss: one that hardly moves has no spikes in its last digits
NONE = [0.0, 0.0, 0.0]  # said of no step


class Guarding(RunCallback):
    """Counts steps that were not taken because a loss or a gradient was not finite, and watches the loss.

    After `skipped_in_a_row` of them, or when the median loss of the last `recent` steps is more than `spike` robust
    standard deviations above that of the `history` steps before these, the run goes back to its newest whole checkpoint
    (in the second case from before the `recent` steps; skipped ones have changed no weight), and on from there with the
    data that comes after: at most `rollbacks` times.

    A step that only a float16 run's loss scale overflowed in is counted, and no more.

    A step's numbers are read while the next one is computed, so that no device is waited for.
    """

    turn = FIRST  # no checkpoint is made of what it finds wrong

    def __init__(
        self,
        skipped_in_a_row: int = 8,
        spike: float = 8.0,
        recent: int = 32,
        history: int = 512,
        rollbacks: int = 3,
    ):
        if min(skipped_in_a_row, recent, history) < 1 or rollbacks < 0 or not spike > 0:
            raise ValueError("skipped_in_a_row, recent, history and spike must be positive, rollbacks not negative")
        self.skipped_in_a_row, self.spike, self.rollbacks = skipped_in_a_row, spike, rollbacks
        self.recent, self.history = recent, history

    def start(self) -> None:
        self._loss, self._later = torch.zeros(()), Later()
        kept = self.run.state.get(KEY, {"losses": [], "skipped": 0, "in_a_row": 0})
        self.run.reach_images = (self.recent + 1) * self.run.module.progress.batch_size  # a spike is known a step late
        self._losses = deque(kept["losses"], maxlen=self.history + self.recent)  # of steps that were taken
        self._skipped, self._in_a_row = kept["skipped"], kept["in_a_row"]
        if self.run.first and (gone_back := Rollbacks(self.run.folder).all):  # at the place that each start knows
            self.run.log({"train/rollbacks": len(gone_back)}, gone_back[-1].images_seen)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        share = module.last_terms.loss.mean() / trainer.accumulate_grad_batches
        self._loss = self._loss.to(share.device) + share
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def ask(self) -> list[float]:
        """Of the step before."""
        return self._later.numbers() or NONE

    def after_step(self, previous: int) -> None:
        run = self.run
        means = run.answer(self)
        if (earlier := self._later.at) is not None:
            self._judge(earlier, means)
        kept, scale = run.module.nonfinite.kept, run.module.loss_scale
        numbers = torch.stack([self._loss, self._there(kept), self._there(scale.to_blame if scale else 0.0)])
        self._loss = torch.zeros_like(self._loss)
        self._later.keep(previous, numbers)

    def _there(self, x: Tensor | float) -> Tensor:
        """On the loss's device; a number is filled in there, for a copy from the host would wait."""
        return x.to(self._loss.device) if isinstance(x, Tensor) else self._loss.new_full((), x)

    def before_save(self) -> None:
        self._settle()
        state = {"losses": list(self._losses), "skipped": self._skipped, "in_a_row": self._in_a_row}
        self.run.state[KEY] = state

    def on_train_end(self, trainer, module) -> None:
        self._settle()

    def _settle(self) -> None:
        if (last := self._later.at) is not None:
            means = self.run.agreement.mean(self._later.numbers())
            self._later = Later()
            self._judge(last, means)

    def _judge(self, at: int, means: Sequence[float]) -> None:
        """Of the step that began when `at` images had been seen. All ranks come to the same judgement."""
        if self.run.rolled_back:
            return  # one step was on its way when that was decided
        loss, kept, scale_to_blame = means
        if kept == 1:
            self._in_a_row = 0
            self._losses.append(loss)
            self._check_loss(at)
            return
        self._count(at)
        if scale_to_blame and isfinite(loss):  # float16 finds its scale so: the next step has half of it
            return
        self._in_a_row += 1
        what = "gradient" if isfinite(loss) else "loss"
        self.run.alert("step not taken", f"the {what} at {at:,} images was not finite: that step was not taken")
        if self._in_a_row >= self.skipped_in_a_row:  # none of them has changed a weight: any checkpoint will do
            self._go_back(at, f"{self._in_a_row} steps in a row had a loss or a gradient that is not finite")

    def _count(self, at: int) -> None:
        self._skipped += 1  # logged at the end of that step, whenever it is judged: so with a restart as without
        self.run.log({"train/skipped_steps": self._skipped}, at + self.run.module.progress.batch_size)

    def _check_loss(self, at: int) -> None:
        if len(self._losses) < self.history + self.recent:
            return
        losses = list(self._losses)
        past, now = losses[: self.history], median(losses[self.history :])
        usual = median(past)
        deviation = max(TO_DEVIATION * median(abs(loss - usual) for loss in past), LEAST_DEVIATION * abs(usual))
        if now > usual + self.spike * deviation:
            reason = f"the loss was {now:.4g} in the last {self.recent} steps, {usual:.4g} in the {self.history} before"
            self._go_back(at - (self.recent - 1) * self.run.module.progress.batch_size, reason)

    def _go_back(self, began: int, reason: str) -> None:
        """To the newest whole checkpoint of at most `began` images. All ranks must call it."""
        run = self.run
        run.settle()  # a checkpoint may be on its way to the disk
        run.beat("the search for a checkpoint", SAVE_TIMEOUT_SECONDS)
        found, damage, _ = before(run.folder / CHECKPOINTS, began, run.agreement)
        rollbacks = run.agreement.gather(len(Rollbacks(run.folder).all) if run.first else None)[0]
        where = f"At {run.images_seen:,} images {reason}"
        if found is None or rollbacks >= self.rollbacks:
            none = "; ".join(["there is no whole checkpoint from before", *damage])
            why = f"{rollbacks} rollbacks were of no use" if found else none
            raise UserError(
                f"{where}, and {why}. Begin anew under another name=... with a lower optimizer.lr, a longer warm-up "
                "(optimizer.lr_schedule.warmup_images) or clipped gradients (trainer.gradient_clip_norm=1.0)"
            )
        images = found.images_seen
        problems = run.agreement.gather(self._leave_out(found.folder, images, reason) if run.first else None)
        if problems[0]:
            raise UserError(f"{where}; going back to {images:,} failed: {problems[0]}")
        run.saved_at = images
        passed_over = "".join(f" (not to a newer one: {problem})" for problem in damage)
        run.alert("rollback", f"{where}: going back to {images:,}{passed_over}, and on with the data after these")
        run.stopping = run.rolled_back = run.trainer.should_stop = True

    def _leave_out(self, checkpoint: Path, images: int, reason: str) -> str | None:
        """In this order: a crash between two of them only makes the run see the same data again."""
        try:
            go_back_to(checkpoint)
            set_aside_after(self.run.folder / SNAPSHOTS, order_of(checkpoint))
            Rollbacks(self.run.folder).add(images, self.run.images_seen, reason)
        except OSError as error:
            return str(error)
        return None


class Later:
    """Numbers of a step on a device, read a step later."""

    def __init__(self):
        self.at: int | None = None  # images seen before that step
        self._copied: tuple[Tensor, torch.cuda.Event | None] | None = None

    def keep(self, at: int, numbers: Tensor) -> None:
        """In the place of those before."""
        event = torch.cuda.Event() if numbers.is_cuda else None
        self.at, self._copied = at, (numbers.to("cpu", non_blocking=True), event)
        if event:
            event.record()

    def numbers(self) -> list[float] | None:
        """Those that are kept, once they are there; None without."""
        if self._copied is None:
            return None
        numbers, event = self._copied
        if event:
            event.synchronize()
        return numbers.tolist()
