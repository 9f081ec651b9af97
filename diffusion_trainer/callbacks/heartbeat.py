"""Signs of life of a run, and its end when they stay away."""

from math import inf
from pathlib import Path

from lightning.pytorch import Trainer

from diffusion_trainer.callbacks.last_words import STARVED, RankFiles
from diffusion_trainer.callbacks.run import LAST, RunCallback
from diffusion_trainer.callbacks.watchdog import Watchdog
from diffusion_trainer.training.module import DiffusionModule


class Heartbeat(RunCallback):
    """Each call of the model, each batch and each checkpoint is a sign of life: when none comes for
    `hang_timeout_seconds` on a rank, it writes down what all its threads do and ends with exit code 76 (`Watchdog`).

    A rank that cannot (it is stopped, its node is gone) is noticed by the others, which wait for it. Until the first
    step is over, `start_timeout_seconds` are allowed: compiling, reading the references of an evaluation. But not for
    the first batch: workers that hang as they are forked are no reason for all ranks to wait so long.
    """

    turn = LAST  # so that "waiting for data" is not what another callback does

    def __init__(self, hang_timeout_seconds: float = 540.0, start_timeout_seconds: float = 1800.0):
        if not 0 < hang_timeout_seconds <= start_timeout_seconds < inf:
            raise ValueError(
                "hang_timeout_seconds must be positive and at most start_timeout_seconds, both finite, not "
                f"{hang_timeout_seconds:g} and {start_timeout_seconds:g}"
            )
        self.hang_timeout_seconds, self.start_timeout_seconds = hang_timeout_seconds, start_timeout_seconds
        self._watchdog: Watchdog | None = None

    def setup(self, trainer: Trainer, module: DiffusionModule, stage: str) -> None:
        self._module, self._allowed_seconds = module, self.start_timeout_seconds
        files = RankFiles(Path(trainer.default_root_dir) / "logs", trainer.global_rank, self.attempt)
        self._watchdog = Watchdog(files, trainer.world_size, self._progress)
        self._hook = module.model.register_forward_pre_hook(self._of_the_model)
        self._watchdog.start(self.start_timeout_seconds)

    def _progress(self) -> tuple[int, int]:
        seen = self._module.images_seen
        return seen // self._module.progress.batch_size, seen

    def start(self) -> None:
        self.run.beat = self._beat
        self._watchdog.beat(STARVED, self.hang_timeout_seconds)

    def _beat(self, doing: str, allowed_seconds: float = 0.0) -> None:
        self._watchdog.beat(doing, max(allowed_seconds, self._allowed_seconds))

    def _of_the_model(self, model, arguments) -> None:
        self._beat("a training step" if self._module.training else "an evaluation")

    def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
        self._beat("a training step")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._allowed_seconds = self.hang_timeout_seconds
        self._beat(STARVED)

    def on_train_epoch_end(self, trainer, module) -> None:
        self._beat("the end", self.start_timeout_seconds)  # where ranks wait for each other, not for data

    def on_train_end(self, trainer, module) -> None:
        self._beat("the end", self.start_timeout_seconds)

    def on_exception(self, trainer, module, exception: BaseException) -> None:
        self._end(well=False)

    def teardown(self, trainer, module, stage: str) -> None:
        self._end(well=True)

    def _end(self, well: bool) -> None:
        """A failure may come before `setup`, or while the others are being torn down."""
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            self._hook.remove()
            watchdog.stop(well)
