"""Searches: Optuna's own, kept over interruptions; what becomes of each trial."""

import json
import math
import sys
from pathlib import Path

import optuna
import pytest
import sweeping
import yaml
from options import built

from diffusion_trainer.apps.config import axes, value_of
from diffusion_trainer.apps.launchers import Launcher, Started
from diffusion_trainer.apps.planning import Planner
from diffusion_trainer.apps.searching import Random, Search, Tpe
from diffusion_trainer.apps.sweep_report import table
from diffusion_trainer.conventions import UserError, seed_of

pytestmark = pytest.mark.slow

SPACE = ["x=interval(-1,2)", "y=tag(log,interval(1e-4,1))", "n=int(interval(1,8))", "kind=a,b"]
SEARCHES = {name: search for name, search in built("sweeper").items() if isinstance(search, Search)}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def show(overrides) -> str:
    """A stand-in's configuration: it writes to what `out` says, below runs/x."""
    keys = ("out", "x", "y", "n", "kind")
    config = {key: value_of(overrides, key) for key in keys}
    if config["n"] == 7:
        raise UserError("n: seven is refused")
    return yaml.safe_dump({**config, "checkpoint": "runs/x"})


@pytest.fixture(autouse=True)
def checkpoint(monkeypatch):
    monkeypatch.setattr("diffusion_trainer.apps.places.checkpoint_in", lambda path: path.absolute() / "c" / "images-1")


def fid(config) -> float:
    """Best at x = 0.3, y = 0.01."""
    return (config["x"] - 0.3) ** 2 + math.log10(config["y"] / 0.01) ** 2 + (config["kind"] == "b")


class Killed(Exception):
    """What SIGKILL does to a sweep, where a test can go on."""


class AtOnce(Launcher, Started):
    """Writes each point's report when it is started."""

    at_once, lives_on, seconds = 1, False, 0.0

    def __init__(self, result=fid, killed_at: int | None = None, code: int = 0):
        self.result, self.killed_at, self.exit_code, self.asked = result, killed_at, code, []

    def start(self, verb, point, job, held) -> Started:
        self.asked.append(point.swept)
        if len(self.asked) == self.killed_at:
            raise Killed
        point.place.report.parent.mkdir(parents=True, exist_ok=True)
        point.place.report.write_text(json.dumps({"metrics": {"fid": self.result(point.config)}}))
        return self

    def code(self) -> int:
        return self.exit_code

    def stop(self, number: int) -> None:
        return None

    def prune(self) -> bool:
        return True


def searched(search: Search, launcher: Launcher, space=SPACE):
    course = search.course(Planner("evaluate", show), space)
    return sweeping.begin(course, launcher)


def space_without_seven() -> list[str]:
    return [*SPACE[:2], "n=1,2,3", SPACE[3]]


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_of_conf_asks_for_so_many_points_inside_of_its_space(name):
    launcher = AtOnce()
    space = axes(space_without_seven())
    searched(SEARCHES[name], launcher, space_without_seven())
    assert len(launcher.asked) == SEARCHES[name].trials
    for x, y, n, kind in launcher.asked:
        assert -1 <= float(x[2:]) <= 2
        assert 1e-4 <= float(y[2:]) <= 1
        assert n in space[2].choices
        assert kind in space[3].choices
    assert len({kind for *_, kind in launcher.asked}) == 2


@pytest.mark.parametrize(
    "search", [Tpe(12, "fid", startup_trials=3), Random(12, "fid")], ids=lambda s: type(s).__name__
)
def test_it_is_optunas_own_search_each_trial_with_a_seed_of_its_own(search):
    """Against ask and tell of a study in memory."""
    launcher = AtOnce()
    searched(search, launcher, space_without_seven())
    study = optuna.create_study()
    for number, asked in enumerate(launcher.asked):
        seed = seed_of("sweep", 0, number) % 2**32
        startup = {"n_startup_trials": 3} if isinstance(search, Tpe) else {}
        kind = optuna.samplers.TPESampler if isinstance(search, Tpe) else optuna.samplers.RandomSampler
        study.sampler = kind(seed=seed, **startup)
        trial = study.ask()
        x, y = trial.suggest_float("x", -1, 2), trial.suggest_float("y", 1e-4, 1, log=True)
        n = trial.suggest_categorical("n", ("n=1", "n=2", "n=3"))
        choice = trial.suggest_categorical("kind", ("kind=a", "kind=b"))
        assert asked == (f"x={x!r}", f"y={y!r}", n, choice)
        study.tell(trial, fid({"x": x, "y": y, "kind": choice[-1]}))


def test_a_search_that_was_killed_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    tpe = Tpe(9, "fid", startup_trials=3)
    whole = AtOnce()
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    undisturbed = table(searched(tpe, whole, space_without_seven()).record)
    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "killed")
    asked = []
    for killed_at in (3, 1, 4):
        launcher = AtOnce(killed_at=killed_at)
        with pytest.raises(Killed):
            searched(tpe, launcher, space_without_seven())
        asked += launcher.asked[:-1]
        (journal,) = Path().rglob("search-*.journal")
        with journal.open("ab") as file:  # torn in the middle of a line
            file.write(b'{"op_code":4,"wor')
        journal.with_name(f"{journal.name}.lock").symlink_to(journal.name)
    launcher = AtOnce()
    record = searched(tpe, launcher, space_without_seven()).record
    assert asked + launcher.asked == whole.asked
    assert table(record) == undisturbed
    assert "best fid: " in undisturbed
    again = AtOnce()
    searched(tpe, again, space_without_seven())
    assert again.asked == []
    searched(Tpe(11, "fid", startup_trials=3), again, space_without_seven())
    assert len(again.asked) == 2


def test_another_sweeper_goes_on_with_what_is_known_and_another_space_is_another_search():
    searched(Random(3, "fid"), AtOnce(), space_without_seven())
    launcher = AtOnce()
    sweep = searched(Tpe(5, "fid", startup_trials=1), launcher, space_without_seven())
    assert len(launcher.asked) == 2
    assert len(sweep.record.entries) == 5
    sweep = searched(Tpe(2, "fid"), AtOnce(), [*SPACE[:2], "n=1,2", SPACE[3]])
    assert len(sweep.record.entries) == 2


def test_trials_that_fail_are_failed_in_the_study_too_and_a_later_start_has_others_instead():
    sweep = searched(Random(3, "fid"), AtOnce(code=9), space_without_seven())
    assert sweep.codes == [9, 9, 9]
    assert set(sweeping.states(str(sweep.course.home)).values()) == {"failed"}
    better = AtOnce()
    sweep = searched(Random(3, "fid"), better, space_without_seven())
    assert sweep.codes == [0, 0, 0]
    states = [trial.state.name for trial in sweep.course._study.trials]
    assert states == ["FAIL"] * 3 + ["COMPLETE"] * 3
    assert len(sweep.record.entries) == 6


def test_a_value_that_is_not_finite_is_no_better_than_a_failure():
    sweep = searched(Random(2, "fid"), AtOnce(lambda config: math.nan), space_without_seven())
    assert [trial.state.name for trial in sweep.course._study.trials] == ["FAIL", "FAIL"]


def test_a_point_that_is_refused_is_a_failed_trial(capsys):
    """Inside of the space: its edges are looked at before the first trial."""
    launcher = AtOnce()
    sweep = searched(Random(30, "fid"), launcher)
    states = [trial.state.name for trial in sweep.course._study.trials]
    assert states.count("FAIL") >= 1
    assert len(launcher.asked) == states.count("COMPLETE") == 30 - states.count("FAIL")
    assert "failed:\nn: seven is refused" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"nothing was started\n.*n=7"):
        searched(Random(3, "fid"), launcher, [*SPACE[:2], "n=int(interval(1,7))", SPACE[3]])


# ---- pruning ---------------------------------------------------------------------------------------------------------


class Slow(AtOnce):
    """A point that has a history of `levels[i]` at 10, 20, ... images, one record more at each look."""

    def __init__(self, levels):
        super().__init__()
        self.levels = list(levels)

    def start(self, verb, point, job, held) -> Started:
        self.asked.append(point.swept)
        self.level, self.history, self.report = self.levels.pop(0), [], point.place.report
        self.stopped = self.asked_to_end = 0
        self.report.parent.mkdir(parents=True, exist_ok=True)
        return self

    def code(self) -> int | None:
        if self.stopped:
            return 128 + self.stopped
        self.history.append({"images_seen": 10 * len(self.history) + 10, "fid": self.level})
        self.report.write_text(json.dumps({"metrics": {"fid": self.level}, "history": self.history}))
        return 0 if len(self.history) == 5 else None

    def prune(self) -> bool:
        """SLURM's controller does not answer the first time."""
        self.asked_to_end += 1
        self.stopped = 15 * (self.asked_to_end == 2)
        return bool(self.stopped)


def show_train(overrides) -> str:
    config = yaml.safe_load(show(overrides))
    folder = value_of(overrides, "folder")
    measured = {"evaluation": {}, "callbacks": {"evaluate": {}}}
    return yaml.safe_dump(config | measured | {"name": "x", "folder": folder or "runs/x", "checkpoint": None})


@pytest.mark.parametrize(("warmup", "looks"), [(0, 2), (25, 4)])
def test_a_trial_that_is_worse_than_the_median_is_stopped_and_told(warmup, looks, capsys):
    """Told at the second attempt, a look later."""
    search = Random(5, "fid", prune=True, prune_startup_trials=2, prune_warmup_images=warmup)
    course = search.course(Planner("train", show_train), space_without_seven())
    launcher = Slow([1.0, 2.0, 9.0, 1.5, 0.5])
    sweep = sweeping.begin(course, launcher, "train")
    trials = course._study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    assert sweep.codes == [0] * 5
    assert [entry.state for entry in sweep.record.entries] == ["done", "done", "pruned", "done", "done"]
    assert [len(trial.intermediate_values) for trial in trials] == [5, 5, looks, 5, 5]
    assert "best fid: 0.5" in table(sweep.record)
    assert capsys.readouterr().out.count("it is stopped") == 1


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_a_metric_that_no_point_has_stops_the_search_and_says_which_there_are():
    with pytest.raises(UserError, match=r"metric=kid: runs/x/.* has no such metric; there is fid"):
        searched(Random(2, "kid"), AtOnce(), space_without_seven())


def test_a_metric_that_is_no_number_is_none_and_a_report_that_is_missing_has_none(monkeypatch):
    """The same command goes on when that has been mended."""
    with pytest.raises(UserError, match=r"metric=fid: runs/x/.* has no such metric; there is none"):
        searched(Random(2, "fid"), AtOnce(lambda config: "low"), space_without_seven())
    silent = AtOnce()
    monkeypatch.setattr(silent, "start", lambda *_: silent)
    with pytest.raises(UserError, match=r"metric=fid: runs/x/.* has no such metric; there is none"):
        searched(Random(2, "fid", seed=1), silent, [*SPACE[:2], "n=1", SPACE[3]])
    sweep = searched(Random(2, "fid", seed=1), AtOnce(), [*SPACE[:2], "n=1", SPACE[3]])
    assert sweep.codes == [0, 0]


@pytest.mark.parametrize(
    ("missing", "say"), [("evaluation", "say evaluation=..."), ("callbacks", "callbacks.evaluate")]
)
def test_runs_that_measure_nothing_are_refused_before_the_first_trial(missing, say):
    def unmeasured(overrides) -> str:
        null = {"evaluation": {"evaluation": None}, "callbacks": {"callbacks": {"evaluate": None}}}
        return yaml.safe_dump(yaml.safe_load(show_train(overrides)) | null[missing])

    with pytest.raises(UserError, match="there is no metric to search by") as error:
        Random(2, "fid").course(Planner("train", unmeasured), space_without_seven())
    assert say in str(error.value)


class Busy(AtOnce):
    """Jobs, whose controller does not answer at first."""

    lives_on = True

    def start(self, verb, point, job, held) -> Started:
        super().start(verb, point, job, held)
        if len(self.asked) < 3:
            raise UserError("squeue: Socket timed out")
        return self


def test_a_point_that_could_not_be_queued_is_not_told_to_the_study_and_is_asked_for_again():
    busy = Busy()
    sweep = searched(Random(3, "fid"), busy, space_without_seven())
    assert sweep.codes == [2, 2, 0]
    assert [trial.state.name for trial in sweep.course._study.trials] == ["RUNNING", "RUNNING", "COMPLETE"]
    again = AtOnce()
    assert searched(Random(3, "fid"), again, space_without_seven()).codes == [0, 0]
    assert again.asked == busy.asked[:2]


def test_how_points_run_makes_no_other_search():
    studies = [
        Random(2, "fid").course(Planner("evaluate", show, beside=("time", "launcher")), [*space_without_seven(), *more])
        for more in ([], ["time=4"], ["launcher=a", "+time.zone=8"], ["seed=1"])
    ]
    assert [course.study == studies[0].study for course in studies] == [True, True, True, False]
    swept = Random(2, "fid").course(Planner("evaluate", show, beside=("kind",)), space_without_seven())
    assert swept.study == studies[0].study


def test_without_optuna_a_search_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"Optuna, the extra `sweep`.*pip install --editable '.\[sweep\]'"):
        searched(Tpe(2, "fid"), AtOnce())
