"""Evaluation while training: samples from the EMA weights, metrics, a grid of pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from PIL.Image import Image

from diffusion_trainer.callbacks.run import RunCallback, crossed
from diffusion_trainer.evaluation import pictures
from diffusion_trainer.evaluation.evaluation import Interrupted
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.evaluation.writing import whole
from diffusion_trainer.training.checkpoints import Checkpoint
from diffusion_trainer.training.ema import KEY
from diffusion_trainer.training.module import to_pixels

ROWS, COLUMNS = 8, 10
DUE = "evaluation_due"  # in the run's state: an evaluation was interrupted
REPORT = "metrics.json"


class Evaluating(RunCallback):
    """Every `every_n_images`, at the end, and at the very start when `at_start`: metrics and a grid, on all ranks.

    The checkpoint of the same step comes before it, and is without it: once done, it is in metrics.json. A run that
    goes on from there reads it in that file, or makes up for it where it never came to its end; so does one that has
    taken all its steps (see `owed`).
    """

    def __init__(self, every_n_images: int, at_start: bool = True):
        if every_n_images < 1:
            raise ValueError(f"every_n_images must be positive, not {every_n_images}")
        self.every_n_images, self.at_start = every_n_images, at_start

    def start(self) -> None:
        run, now = self.run, self.run.images_seen
        self._pictures: list[tuple[int, Image]] = []  # that could not be written yet, with their images seen
        self._unreported = False  # whether metrics.json could not be written
        (written, *_) = run.agreement.gather(_written(run.folder) if run.first else [])
        self.history = _history(run.state, written, now)
        run.state["evaluations"] = self.history
        due = self._due(now - run.module.progress.batch_size) if now else self.at_start
        interrupted = run.state.pop(DUE, False)
        if (interrupted or due) and not _has(self.history, now) and not self.evaluate():
            run.stop()  # before the first step: these are the weights to be measured

    def after_step(self, previous: int) -> None:
        if self._due(previous) and not self.run.stopping and not self.evaluate():
            self.run.stop()  # not a step later, when this evaluation can no longer be made up for

    def _due(self, previous: int) -> bool:
        now = self.run.images_seen
        return now >= self.run.module.progress.num_images or crossed(previous, now, self.every_n_images)

    def evaluate(self) -> bool:
        """Whether it came to its end; otherwise the run is stopping, and makes up for it when it goes on."""
        run = self.run
        start = monotonic()
        try:
            with run.aside(), _evaluation_mode(run.module), run.sharding.swapped(KEY) as averaged:
                generator = run.generator()
                metrics = self._metrics(generator)
                picture = self._picture(generator)
        except Interrupted:
            run.state[DUE] = True
            return False
        record = {"images_seen": run.images_seen, "weights": KEY if averaged else "initial", **metrics}
        what = f"evaluation at {run.images_seen:,} images: {describe(metrics)}" if metrics else "pictures"
        run.say(f"  {what}   ({monotonic() - start:.0f} s)")
        if run.first:
            self._pictures.append((run.images_seen, picture))
            self._save_pictures()
            for logger in run.trainer.loggers:
                logger.log_picture(pictures.METRIC, picture, run.images_seen)
        self.history.append(record)
        run.log({f"eval/{name}": value for name, value in metrics.items()})
        self._report()  # last: what it has is not done again
        return True

    def _metrics(self, generator: Generator) -> dict[str, float]:
        run = self.run
        if run.evaluation is None:
            return {}
        return run.evaluation(generator, run.told_to_stop)

    def _picture(self, generator: Generator):
        """A grid of ROWS x COLUMNS samples, always the same numbers; ten classes stand one to a column."""
        # Every rank draws them all: as many calls on each, and no gathering.
        conditions = self.run.module.model.conditioning.examples(ROWS * COLUMNS)
        x_0 = generator.draw(list(range(ROWS * COLUMNS)), conditions)
        return pictures.grid(to_pixels(x_0), COLUMNS, pictures.scale_for(x_0.shape[2]))

    def _save_pictures(self) -> None:
        folder = self.run.folder
        with self.run.going_on("a picture of samples"):
            while self._pictures:
                images_seen, picture = self._pictures[0]
                pictures.save(picture, pictures.of_evaluation(folder, images_seen))
                pictures.save(picture, folder / "samples.png")
                self._pictures.pop(0)

    def catch_up(self) -> None:
        self._save_pictures()
        if self._unreported:
            self._report()

    def on_train_end(self, trainer, module) -> None:
        self.catch_up()

    def _report(self) -> None:
        """metrics.json: the last evaluation, the history, and what they were measured with."""
        run, last = self.run, self.history[-1]
        report = {
            "metrics": {k: v for k, v in last.items() if k not in ("images_seen", "weights")},
            "images_seen": last["images_seen"],
            "provenance": {
                "weights": last["weights"],
                **(run.evaluation.provenance() if run.evaluation else {}),
                **run.state["provenance"],
            },
            "history": self.history,
        }
        if run.first:
            self._unreported = True
            with run.going_on(REPORT):
                with whole(run.folder / REPORT) as part:
                    part.write_text(json.dumps(report, indent=2) + "\n")
                self._unreported = False


def owed(callbacks: Sequence[RunCallback], folder: Path, checkpoint: Checkpoint) -> bool:
    """Whether a run whose last step is in the checkpoint never came to the end of its last evaluation."""
    now = checkpoint.images_seen
    history = _history(checkpoint.manifest["state"], _written(folder), now)
    return any(isinstance(callback, Evaluating) for callback in callbacks) and not _has(history, now)


def _history(state: Mapping[str, Any], written: Sequence[dict], now: int) -> list[dict]:
    """The records of a checkpoint's state and of metrics.json, which may know of later ones than the checkpoint."""
    known = {record["images_seen"]: record for record in state.get("evaluations", [])}
    known |= {record["images_seen"]: record for record in written if record["images_seen"] <= now}
    return [known[images] for images in sorted(known)]


def _has(history: Sequence[dict], images_seen: int) -> bool:
    return any(record["images_seen"] == images_seen for record in history)


def _written(folder: Path) -> list[dict]:
    path = folder / REPORT
    try:
        history = json.loads(path.read_text())["history"] if path.is_file() else []
        return [{**record, "images_seen": int(record["images_seen"])} for record in history]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        print(f"warning: {path} is damaged ({error}): evaluations since the last checkpoint are done again", flush=True)
        return []


class _evaluation_mode:
    """Dropout off inside, each module's own mode back after."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self.training = [m for m in self.module.modules() if m.training]
        self.module.eval()

    def __exit__(self, *_) -> None:
        for m in self.training:
            m.training = True


def describe(metrics: dict[str, float]) -> str:
    """FID 1.23, pixel distance 0.45, 97.8 % recognised."""
    words = {"fid": "FID {:.3f}", "pixel_fd": "pixel FD {:.3f}", "accuracy": "{:.1%} recognised"}
    return ", ".join(words[name].format(value) for name, value in metrics.items())
