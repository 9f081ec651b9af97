"""Searches: Optuna asks for points and is told their metric.

The study's journal stands in the sweep's folder: a search that was killed goes on with the trials that it was at, and
then as if nothing had happened, since trial n is drawn with a seed of its own.
"""

import importlib
import json
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from diffusion_trainer.apps.config import Axis, axes
from diffusion_trainer.apps.keys import first
from diffusion_trainer.apps.places import Point
from diffusion_trainer.apps.planning import Planner, home_of
from diffusion_trainer.apps.sweep_record import DONE, FAILED, PRUNED
from diffusion_trainer.apps.sweepers import Course, Sweeper
from diffusion_trainer.conventions import UserError, seed_of


@dataclass(frozen=True)
class Search(Sweeper):
    """trials: in all, but those that failed in an earlier start. metric: of the points' reports.

    prune: a run whose metric is worse than the median of the trials at the same images is stopped (optuna's
    MedianPruner), once prune_startup_trials have ended and it has seen more than prune_warmup_images.
    """

    trials: int
    metric: str
    direction: Literal["minimize", "maximize"] = "minimize"
    seed: int = 0
    prune: bool = False
    prune_startup_trials: int = 5
    prune_warmup_images: int = 0

    def __post_init__(self):
        if self.trials < 1:
            raise ValueError(f"trials must be positive, not {self.trials}")
        if self.prune_startup_trials < 0 or self.prune_warmup_images < 0:
            raise ValueError("prune_startup_trials and prune_warmup_images must not be negative")

    @abstractmethod
    def sampler(self, seed: int) -> Any:
        """optuna's, for one trial."""

    def course(self, planner: Planner, overrides: Sequence[str]) -> Course:
        _optuna()
        if self.prune and planner.verb != "train":
            raise UserError(f"prune=true is for train: {planner.verb} has no metrics before its end; leave it out")
        space = axes(overrides)
        ends = planner.points(_ends(space))  # what is wrong at an edge is said before the first trial
        if ends[0].place.report is None:
            raise UserError(f"{planner.verb} has no metric to search by; train, evaluate and likelihood have")
        if planner.verb == "train":
            _check_evaluated(ends)
        return Searching(self, planner, space, ends)


@dataclass(frozen=True)
class Random(Search):
    def sampler(self, seed: int) -> Any:
        return _optuna().samplers.RandomSampler(seed=seed)


@dataclass(frozen=True)
class Tpe(Search):
    startup_trials: int = 10

    def sampler(self, seed: int) -> Any:
        return _optuna().samplers.TPESampler(seed=seed, n_startup_trials=self.startup_trials)


class Searching(Course):
    """The trials of one study: those with the same space, fixed overrides, metric and direction."""

    at_once = 4  # more at a time learn less from each other

    def __init__(self, search: Search, planner: Planner, space: Sequence[str | Axis], ends: Sequence[Point]):
        self.search, self.planner, self.space = search, planner, space
        self.home, self.count = home_of(ends), search.trials
        self.metric, self.direction = search.metric, search.direction
        what = [part for part in space if isinstance(part, Axis) or first(part) not in planner.beside]
        said = json.dumps([planner.verb, str(what), search.metric, search.direction])
        self.study = blake2b(said.encode(), digest_size=6).hexdigest()
        self._running: dict[str, list[Any]] = {}  # place -> optuna's trials that are there
        self._read: dict[str, int] = {}  # place -> when its report was last read

    def points(self) -> Iterator[Point]:
        """First those that were running when the search was killed."""
        study = self._study = _study(self.home / f"search-{self.study}.journal", self.search)
        states, optuna = [t.state for t in study.trials], _optuna()
        failed = states.count(optuna.trial.TrialState.FAIL)
        self.count = self.search.trials + failed
        for trial in study.trials:
            if trial.state == optuna.trial.TrialState.RUNNING:
                yield from self._point(optuna.trial.Trial(study, trial._trial_id))
        while len(study.trials) < self.count:
            study.sampler = self.search.sampler(seed_of("sweep", self.search.seed, len(study.trials)) % 2**32)
            yield from self._point(study.ask())

    def _point(self, trial: Any) -> Iterator[Point]:
        """The trial's point; none if its configuration is wrong, which it then has failed for."""
        swept = [_suggested(trial, axis) for axis in self.space if isinstance(axis, Axis)]
        chosen = iter(swept)
        texts = [next(chosen) if isinstance(part, Axis) else part for part in self.space]
        try:
            point = self.planner.point(texts, swept)
        except UserError as error:
            print(f"trial {trial.number}, {' '.join(swept)}, failed:\n{error}", flush=True)
            self._study.tell(trial, state=_optuna().trial.TrialState.FAIL)
            return
        self._running.setdefault(str(point.place.out), []).append(trial)
        yield point

    def ended(self, point: Point, code: int, pruned: bool) -> str:
        states = _optuna().trial.TrialState
        self.is_worse(point)  # what it has reported last
        value = math.nan if code else self._value(point.place.report)
        state = states.COMPLETE if not code and math.isfinite(value) else states.PRUNED if pruned else states.FAIL
        trial = self._running[str(point.place.out)].pop(0)
        self._study.tell(trial, value if state == states.COMPLETE else None, state)
        return DONE if not code else PRUNED if pruned else FAILED

    def _value(self, path: Path) -> float:
        """UserError if the report is missing, or has no such number: the search could only go on blindly."""
        metrics = json.loads(path.read_text())["metrics"] if path.is_file() else {}
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if self.metric not in numbers:
            there = ", ".join(numbers) or "none"
            raise UserError(f"metric={self.metric}: {path} has no such metric; there is {there}")
        return numbers[self.metric]

    def is_worse(self, point: Point) -> bool:
        """By the history in its report, each record of it once."""
        place, path = str(point.place.out), point.place.report
        written = path.stat().st_mtime_ns if path.is_file() else 0
        if not self.search.prune or written == self._read.get(place, 0):
            return False
        self._read[place] = written
        trial = self._running[place][0]
        known = self._study.trials[trial.number].intermediate_values
        for record in json.loads(path.read_text()).get("history", []):
            value, images = record.get(self.metric, math.nan), record["images_seen"]
            if images not in known and isinstance(value, int | float) and math.isfinite(value):
                trial.report(value, images)
        return trial.should_prune()


def _ends(space: Sequence[str | Axis]) -> list[tuple[list[str], list[str]]]:
    """Overrides of points that have, each for each axis, one of its ends or choices, the other axes their first."""
    swept = [axis for axis in space if isinstance(axis, Axis)]
    first = {axis.key: axis.ends[0] for axis in swept}
    chosen = [first, *({**first, axis.key: end} for axis in swept for end in axis.ends[1:])]
    return [
        ([part if isinstance(part, str) else at[part.key] for part in space], [at[axis.key] for axis in swept])
        for at in chosen
    ]


def _check_evaluated(points: Sequence[Point]) -> None:
    """UserError if a run would end without metrics."""
    for point in points:
        if point.config["evaluation"] is None:
            raise UserError(f"{point.title}: without an evaluation there is no metric to search by; say evaluation=...")
        if point.config["callbacks"].get("evaluate") is None:
            raise UserError(f"{point.title}: without callbacks.evaluate there is no metric to search by")


def _suggested(trial: Any, axis: Axis) -> str:
    if axis.choices:
        return trial.suggest_categorical(axis.key, axis.choices)
    suggest = trial.suggest_int if isinstance(axis.low, int) else trial.suggest_float
    return axis.at(suggest(axis.key, axis.low, axis.high, log=axis.log))


def _study(path: Path, search: Search) -> Any:
    """The study of the journal at `path`, which nobody else has open: the sweep's folder is ours."""
    optuna = _optuna()
    journal = importlib.import_module("optuna.storages.journal")
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # of a search that was killed while it wrote
    if path.is_file():
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rfind(b"\n") + 1])  # likewise: without this, no later line could be read
    storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
    pruner = optuna.pruners.MedianPruner(search.prune_startup_trials, search.prune_warmup_images)
    return optuna.create_study(
        storage=storage, study_name="sweep", direction=search.direction, load_if_exists=True, pruner=pruner
    )


def _optuna() -> ModuleType:
    """UserError where it is not installed."""
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise UserError(
            f"a search needs Optuna, the extra `sweep` ({error}): pip install --editable '.[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna
