"""Averages kept for later: from them `diffusion-trainer ema` makes averages of other lengths."""

from collections.abc import Collection, Mapping

from diffusion_trainer.callbacks.run import DISK, SAVE_TIMEOUT_SECONDS, RunCallback, crossed
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.ema import Ema, PowerFunction
from diffusion_trainer.training.saving import Saver, folders, order_of

FOLDER = "ema_snapshots"  # of a run
KEY = "ema"  # in the state of a snapshot: the relative_std of each of its averages


def lengths(ema: Ema) -> Mapping[str, float]:
    """The relative_std of each average that is a power function: only those can be put together."""
    return {key: track.relative_std for key, track in ema.tracks.items() if isinstance(track, PowerFunction)}


class EmaSnapshots(RunCallback):
    """<run>/ema_snapshots/images-<n> every `every_n_images` and at the end: 4 bytes a parameter for each average that
    is a power function (`ema=several` has two), written while training goes on.
    """

    def __init__(self, every_n_images: int):
        if every_n_images < 1:
            raise ValueError(f"every_n_images must be positive, not {every_n_images}")
        self.every_n_images = every_n_images

    def start(self) -> None:
        run, self._lengths = self.run, lengths(self.run.module.ema)
        agreement = Agreement(SAVE_TIMEOUT_SECONDS)
        self._saver = Saver(run.folder / FOLDER, run.sharding, agreement, 1 << 30, self._lengths.__contains__)
        there = [order_of(path)[0] for path in folders(run.folder / FOLDER)]
        if any(run.agreement.gather(self._due(run.images_seen - run.module.progress.batch_size, there))):
            self._begin()  # the one of this checkpoint was lost with what came after it

    def after_step(self, previous: int) -> None:
        if self._due(previous, ()) and not self.run.rolled_back:
            self._begin()

    def _due(self, previous: int, there: Collection[int]) -> bool:
        seen = self.run.images_seen
        done = seen >= self.run.module.progress.num_images
        return seen > 0 and seen not in there and (done or crossed(previous, seen, self.every_n_images))

    def _begin(self) -> None:
        self._settle()
        with self.run.aside():
            self._saver.begin(self.run.images_seen, {KEY: self._lengths})

    def _settle(self) -> None:
        self.run.beat("the wait for a snapshot", SAVE_TIMEOUT_SECONDS)
        try:
            with self.run.aside():
                self._saver.wait()
        except OSError as error:
            self.run.alert(DISK, str(error))
        self.run.beat("what follows a step")

    def on_train_end(self, trainer, module) -> None:
        self._settle()
