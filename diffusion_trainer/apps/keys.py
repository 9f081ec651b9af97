"""Whose a key is: sweeps have keys of their own, jobs others, and people mix them up with those of the verbs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from diffusion_trainer.apps.nodes import hint
from diffusion_trainer.conventions import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
OF_SWEEPS = {  # a sweep's keys, and what they are in conf/sweep.yaml
    "hydra/launcher": "runner",
    "parallel": "runner.parallel",
    "sweeper": "sweeper",
    **{key: f"sweeper.{key}" for key in ("trials", "metric", "direction", "prune")},
}
OF_HYDRA = {  # launchers that people know, and what is meant by them here
    "basic": "hydra/launcher=local",
    "joblib": "hydra/launcher=local parallel=<points at the same time>",
    **dict.fromkeys(("submitit", "submitit_slurm"), "hydra/launcher=slurm"),
    "submitit_local": "hydra/launcher=local",
}
AS_JOBS = "points of a sweep as jobs: diffusion-trainer train -m key=a,b hydra/launcher=slurm"


def first(text: str) -> str:
    """The top level's key, or the group, in an override."""
    return text.lstrip("+~").split("=")[0].split(".")[0].split("@")[0]


def advice(key: str, names: Sequence[str], groups: Sequence[str]) -> str:
    """What follows "there is no option <key>": who has it, else the nearest name.

    names: the keys that there are. groups: the folders of conf/, of all commands.
    """
    if first(key) in names:
        return hint(key, names)
    if first(key) in (*OF_SWEEPS, "runner"):
        return "; only a sweep has that: add -m"
    of_jobs = {"launcher", *yaml.safe_load((CONF / "submit.yaml").read_text())} - {"defaults"}
    if first(key) in of_jobs:
        return "; submit has that, and so has train -m with hydra/launcher=slurm"
    return hint(key, [*names, *groups])


def check_chosen(name: str, chosen: str, keys: Mapping[str, str]) -> None:
    """UserError if a sweep's `name` (sweeper, hydra/launcher) has no such option, or one without these keys that
    another has. keys: key -> the override as it was given.
    """
    files = sorted((CONF / OF_SWEEPS[name]).glob("*.yaml"))
    options = {path.stem: yaml.safe_load(path.read_text()) for path in files}
    if chosen not in options:
        near = f"; here that is {OF_HYDRA[chosen]}" if chosen in OF_HYDRA else hint(chosen, list(options))
        raise UserError(f"{name}={chosen}: there is no such option{near}; {name} is one of {', '.join(options)}")
    for key, said in keys.items():
        have = [f"{name}={option}" for option, node in options.items() if key in node]
        if have and key not in options[chosen]:
            raise UserError(f"{said}: {name}={chosen} has no {key}; say {' or '.join(have)}")
