"""The keys of a sweep: its space and its own settings, and mistakes in them."""

import pytest
import yaml

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.config import Axis, axes
from diffusion_trainer.apps.keys import OF_SWEEPS as OWN
from diffusion_trainer.apps.multirun import SweepConfig, split
from diffusion_trainer.conventions import UserError


@pytest.mark.parametrize(
    ("space", "say"),
    [
        (["x=1"], "a search needs a key with several values"),
        (["x=interval(2,1)"], "x=interval(2,1): it must go from less to more"),
        (["x=tag(log,interval(0,1))"], "both positive"),
        (["x=tag(lin,interval(0,1))"], "the only tag is log"),
        (["x=interval(0,1)", "x=2"], "x is given twice"),
        (["x=glob(*)"], "its values are not known"),
    ],
)
def test_what_is_no_space_is_explained(space, say):
    with pytest.raises(UserError) as error:
        axes(space)
    assert say in str(error.value)


def test_axes_stand_where_they_were_given():
    assert axes(["a=1", "x=interval(0,2)", "b=range(1,4)"]) == [
        "a=1", Axis("x", (), 0.0, 2.0), Axis("b", ("b=1", "b=2", "b=3")),
    ]  # fmt: skip


def settings(*arguments: str) -> dict:
    own, _ = split(arguments)
    return configuration.load("sweep", own, SweepConfig)


def test_a_sweeps_own_keys_are_told_from_the_verbs():
    own, others = split(["seed=0", "sweeper=tpe", "trials=3", "metric=accuracy", "direction=maximize", "+x.y=1"])
    assert others == ["seed=0", "+x.y=1"]
    found = configuration.load("sweep", own, SweepConfig)["sweeper"]
    assert (found["trials"], found["metric"], found["direction"]) == (3, "accuracy", "maximize")
    assert settings("hydra/launcher=slurm", "parallel=3")["runner"]["parallel"] == 3
    for verb in ("train", "evaluate", "likelihood", "sample", "submit"):
        keys = yaml.safe_load((configuration.CONF / f"{verb}.yaml").read_text())
        groups = {name for default in keys["defaults"] if isinstance(default, dict) for name in default}
        assert not {*OWN, "runner"} & {*keys, *groups}, verb


@pytest.mark.parametrize(
    ("arguments", "say"),
    [
        (["sweeper=tpee"], "did you mean tpe?"),
        (["sweeper=tpe", "trials=0"], "trials must be positive, not 0"),
        (["sweeper=tpe", "direction=up"], "direction=up"),
        (["sweeper=random", "sweeper.trialz=3"], "did you mean sweeper.trials?"),
        (["trials=3"], "trials=3: sweeper=grid has no trials; say sweeper=random or sweeper=tpe"),
        (["sweeper=grid", "prune=true"], "prune=true: sweeper=grid has no prune; say sweeper=random or sweeper=tpe"),
        (["sweeper=random", "sweeper.startup_trials=3"], "sweeper=random has no startup_trials; say sweeper=tpe"),
        (["parallel=0"], "runner: parallel must be positive, not 0"),
        (["parallel=999"], "parallel=999: there are "),
        (
            ["runner.poll_seconds=3"],
            "runner.poll_seconds=3: hydra/launcher=local has no poll_seconds; say hydra/launcher=slurm",
        ),
        (["hydra/launcher=slrum"], "hydra/launcher=slrum: there is no such option; did you mean slurm?"),
        (["hydra/launcher=joblib"], "here that is hydra/launcher=local parallel=<points at the same time>"),
        (["hydra/launcher=submitit_slurm"], "here that is hydra/launcher=slurm; hydra/launcher is one of local, slurm"),
        (["hydra/launcher=slurm"], "hydra/launcher=slurm is for train; likelihood sweeps here"),
        (["sweeper=tpe", "prune=true"], "prune=true is for train"),
    ],
)
def test_mistakes_in_a_sweeps_own_keys(arguments, say):
    with pytest.raises(UserError) as error:
        console.run(["likelihood", "-m", "checkpoint=runs/x", "n=1,2", *arguments])
    assert say in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "say"),
    [
        ("train hydra/launcher=slurm", "there is no option hydra/launcher; only a sweep has that: add -m"),
        ("train sweeper=tpe", "train has no group sweeper; only a sweep has that: add -m"),
        ("train trials=3", "there is no option trials; only a sweep has that: add -m"),
        ("train nodes=2", "there is no option nodes; submit has that, and so has train -m with hydra/launcher=slurm"),
        ("train launcher=gpu_nodes", "train has no group launcher; submit has that, and so has train -m with"),
        (
            "train -m seed=0,1 nodes=2",
            "no option nodes; submit has that, and so has train -m with hydra/launcher=slurm",
        ),
        (
            "submit -m seed=0,1",
            "submit does not sweep; train, evaluate, likelihood, sample do; points of a sweep as jobs",
        ),
        ("train likelihood=bound", "train has no group likelihood"),
    ],
)
def test_keys_of_sweeps_and_jobs_in_the_wrong_place_say_whose_they_are(arguments, say):
    verb, *overrides = arguments.split()
    with pytest.raises(UserError) as error:
        console.run([verb, "experiment=digits", *overrides])
    assert say in str(error.value)


def test_help_of_a_sweep_lists_its_options(capsys):
    assert console.run(["train", "-m", "--help"]) == 0
    output = capsys.readouterr().out
    for option in ("sweeper=grid", "sweeper=tpe", "runner=slurm", "hydra/launcher=slurm"):
        assert option in output
