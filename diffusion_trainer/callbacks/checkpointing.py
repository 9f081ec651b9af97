"""Checkpoints, and a stop that loses nothing."""

import signal
from types import FrameType

from diffusion_trainer.callbacks.job_starts import remove_stop_files
from diffusion_trainer.callbacks.run import DISK, SAVE, SAVE_TIMEOUT_SECONDS, RunCallback, crossed
from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.looking_ahead import ERROR_AHEAD
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.saving import NotRemoved, Saver

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SAVE_SECONDS = "save_seconds"  # in the run's state: what the checkpoint before took


def signals_to_stop() -> list[signal.Signals]:
    """STOP_SIGNALS, but for SIGHUP where this process was started to outlive its terminal (nohup)."""
    return [s for s in STOP_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


class Checkpointing(RunCallback):
    """A checkpoint every `every_n_images`, at the end, and when SIGINT, SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP reaches any
    rank, or somebody makes the file <folder>/stop (which is removed then). And at the last step before an error of the
    data (a store that does not answer, a worker that was killed) on any rank, with which all end then.

    The handler only sets a flag. After each step the ranks agree on it; then all save and stop. A second SIGINT stops
    at once. SIGHUP that was ignored (nohup) stays so. A checkpoint is copied between two steps and written while
    training goes on, or while an evaluation is under way, which its step's checkpoint is copied before. One that cannot
    be written (a full disk) is an alert and training goes on; that of the end or of a stop is tried twice.
    """

    turn = SAVE

    def __init__(self, every_n_images: int, keep: int = 2):
        if every_n_images < 1 or keep < 1:
            raise ValueError("every_n_images and keep must be positive")
        self.every_n_images, self.keep = every_n_images, keep

    def start(self) -> None:
        run = self.run
        run.save_seconds = run.state.get(SAVE_SECONDS)
        self._saving_at: int | None = None  # what is being written now
        self._told = ""  # the last alert: that of the same save, tried again, is none
        self._reserved = self._interrupted = self._over = False
        self._error_ahead: dict | None = None
        agreement = Agreement(SAVE_TIMEOUT_SECONDS)
        self._saver = Saver(run.folder / "checkpoints", run.sharding, agreement, self.keep, reach=run.reach_images)
        run.save, run.settle = self.save, self.settle
        self._previous = {s: signal.signal(s, self._note) for s in signals_to_stop()}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._interrupted |= number == signal.SIGINT
        if not self._over:  # else all is saved, and only the loggers have something to write
            self.run.stop_signal = number

    def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
        self._error_ahead = batch.get(ERROR_AHEAD)  # before any callback wants its answer

    def ask(self) -> tuple[float, float, float]:
        return float(self.run.told_to_stop()), float(self._saver.failed), float(self._error_ahead is not None)

    def after_step(self, previous: int) -> None:
        run = self.run
        stop, failed, error_ahead = (share > 0 for share in run.answer(self))  # whether any rank says so
        done = run.images_seen >= run.module.progress.num_images
        if failed:
            self.settle()
        if stop:
            run.stop()
        elif error_ahead:
            self._stop_before_error()
        elif done or crossed(previous, run.images_seen, self.every_n_images):
            self._begin()
        elif not self._reserved:
            self._reserve()

    def _stop_before_error(self) -> None:
        """The error is raised once all callbacks have had their turn; on ranks that have none, whose it is."""
        run = self.run
        run.say(f"  the data go no further than {run.images_seen:,} images: saving these")
        run.save()
        errors = run.agreement.gather(self._error_ahead and (self._error_ahead["error"], self._error_ahead["passing"]))
        rank, (message, _) = next((rank, error) for rank, error in enumerate(errors) if error)
        what = self._error_ahead["error"] if self._error_ahead else f"rank {rank} ends with its data: {message}"
        kind = PassingError if all(error[1] for error in errors if error) else UserError
        run.failure, run.stopping, run.trainer.should_stop = kind(what), True, True

    def _reserve(self) -> None:
        self.settle()
        self._saver.reserve()
        self._reserved = True

    def save(self) -> None:
        """What there is to save now is on the disk, or it has been said why not. All ranks must call it."""
        self.settle()
        if self.run.saved_at != self.run.images_seen:
            self._begin()
            self.settle()

    def _begin(self) -> None:
        self.settle()
        run = self.run
        callbacks = [callback for callback in run.trainer.callbacks if isinstance(callback, RunCallback)]
        for callback in callbacks:
            callback.before_save()
        if run.rolled_back:
            return  # what is left is not to be gone on from
        if run.first:
            for logger in run.trainer.loggers:
                logger.save()  # what a full disk has kept back: who goes on from here does not log it again
            for callback in callbacks:
                callback.catch_up()
        with run.aside():
            self._saver.begin(run.images_seen, run.state)
        self._saving_at, self._reserved = run.images_seen, True

    def settle(self) -> None:
        """Waits for the save that is being written, and says what became of it."""
        run, saved_at, self._saving_at = self.run, self._saving_at, None
        run.beat("the wait for a checkpoint", SAVE_TIMEOUT_SECONDS)
        try:
            with run.aside():
                self._saver.wait()
        except OSError as error:
            self._tell(str(error))
            if not isinstance(error, NotRemoved):
                saved_at = None
        if saved_at is not None:
            run.saved_at = saved_at
            run.save_seconds = run.state[SAVE_SECONDS] = self._saver.seconds
        run.beat("what follows a step")

    def _tell(self, error: str) -> None:
        if error != self._told:
            self.run.alert(DISK, error)
        self._told = error

    def on_train_end(self, trainer, module) -> None:
        """run.failure if the end of the run cannot be written."""
        run = self.run
        self.settle() if run.rolled_back else self.save()  # what could not be written perhaps can, now
        self._over = True
        run.agree_on_stop()  # a signal may have come to one rank since the last step
        if run.saved_at != run.images_seen and run.stop_signal is None and not run.rolled_back:
            unsaved = (
                f"the last checkpoint, of {run.images_seen:,} images, could not be written (see above). Make room, and "
                f"run the same command again: it goes on from {run.saved_at:,}, the one before"
            )
            run.failure = type(run.failure)(f"{run.failure}\n{unsaved}") if run.failure else PassingError(unsaved)
        if run.first and run.stop_signal is None and not run.rolled_back and not run.failure:
            remove_stop_files(run.folder)  # made too late to be seen, and the run is done

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
