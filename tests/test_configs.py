"""Every yaml of every group composes, passes the checks and builds."""

import ast
import json
from functools import cache
from pathlib import Path

import pytest
import yaml

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import nodes
from diffusion_trainer.apps.parts import TrainConfig

OPTIONS = sorted(p for p in configuration.CONF.glob("*/*.yaml"))
ELSEWHERE = {"launcher", "likelihood", "mode", "runner", "sweeper"}  # groups of other verbs than train
WITH = {  # what an option does not go without
    "schedule=zero_terminal_snr": ["prediction=v"],
    "schedule=learned": ["weighting=elbo_continuous"],
    "data=remote": ["data.store.cache=cache"],
}


@pytest.mark.parametrize("path", OPTIONS, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_option_builds(path):
    group, choice = path.parent.name, f"{path.parent.name}={path.stem}"
    node = yaml.safe_load(path.read_text())
    if group in ELSEWHERE:
        nodes.build(node, group)
        return
    base = ["data=digits"] if group not in ("experiment", "data") else []
    files = [f"{group}.{key}=some.file" for key in missing(node)] if group == "guidance" else []
    config = configuration.load(
        "train", [*base, choice, "data.shards=x.tar", *WITH.get(choice, []), *files], TrainConfig
    )
    for name, part in config.items():
        builds(name, json.dumps(part))
    if group in config:
        chosen = config[group]
        for line in path.read_text().splitlines():  # the option says what it is, and the composed one is it
            if line.startswith("_target_:"):
                assert chosen["_target_"] == line.split()[1]


@cache
def builds(name, part):
    """Once for each part: an option leaves most of them as they were, and a network takes longer than all the rest."""
    nodes.build(json.loads(part), name)


def missing(node, path=""):
    """The keys of an option that have no default."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from missing(value, f"{path}{key}.")
        elif value == "???":
            yield f"{path}{key}"


def test_every_group_is_of_the_schema_and_every_option_explains_itself():
    groups = {p.parent.name for p in OPTIONS}
    assert groups - {"experiment"} - ELSEWHERE <= set(TrainConfig.model_fields)
    for path in OPTIONS:
        first = next(line for line in path.read_text().splitlines() if not line.startswith("# @"))
        assert first.startswith("# "), f"{path} has no comment that says what it is"


def test_objective_elbo_changes_the_weighting_and_nothing_else():
    simple = configuration.load("train", ["experiment=digits"], TrainConfig)
    elbo = configuration.load("train", ["experiment=digits", "objective=elbo"], TrainConfig)
    assert {k for k in simple if simple[k] != elbo[k]} == {"weighting", "objective"}
    assert elbo["objective"]["weighting"] == elbo["weighting"]


def test_experiment_wins_over_the_defaults_and_the_command_line_over_the_experiment():
    config = configuration.load("train", ["experiment=digits", "optimizer.lr=0.5"], TrainConfig)
    assert config["name"] == "digits"
    assert config["optimizer"]["lr"] == 0.5
    assert config["optimizer"]["lr_schedule"]["warmup_images"] == 2560


def test_no_string_switches_on_targets():
    """A choice is a class: nothing in the package compares _target_ strings."""
    for path in (Path(configuration.__file__).parents[1]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                assert "_target_" not in ast.unparse(node.left) or path.name in ("config.py", "nodes.py"), path
