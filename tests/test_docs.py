"""What the README and the docs show is true: commands run, links and folders exist."""

import csv
import importlib
import json
import re
import shlex
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest
from conftest import ROOT, SMALL, command, finish

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import multirun
from diffusion_trainer.apps.parts import TrainConfig, check_sampling

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "conf").rglob("*.yaml"))]
VERBS = "train|sample|evaluate|variance|likelihood|ema|export|inspect|doctor"
COMMANDS = sorted({c for p in PAGES for c in re.findall(rf"diffusion-trainer ((?:{VERBS}) [^`\n&]+)", p.read_text())})


def runnable(command: str) -> bool:
    """hydra/launcher=slurm: tests/slurm/test_sweeps.py."""
    return "hydra/launcher" not in command and "..." not in command and ":" not in command and "<" not in command


@pytest.fixture(scope="module")
def measured(trained):
    """The run with its variance statistics, one with snapshots of averages, and shards in my/."""
    (trained / "my").symlink_to(trained / "shards" / "digits")
    averages = next(c for c in COMMANDS if "ema_snapshots" in c)
    for shown in (shlex.split("variance checkpoint=runs/digits num_samples=20 num_levels=10"),
                  [*shlex.split(averages), *SMALL, "num_images=10240", "callbacks.evaluate=null"]):  # fmt: skip
        code, output = finish(command(*shown, cwd=trained))
        assert code == 0, output
    return trained


@pytest.mark.slow
@pytest.mark.parametrize("shown", [c for c in COMMANDS if runnable(c)])
def test_every_command_shown_works(shown, measured, monkeypatch, capsys):
    """Training commands are composed and their parts tried on each other, sweeps are planned; the others are run."""
    monkeypatch.chdir(measured)
    verb, *arguments = shlex.split(shown)
    module = importlib.import_module(f"diffusion_trainer.apps.{verb}")
    if "-m" in arguments:
        assert len(multirun.plan(verb, module.show, [a for a in arguments if a != "-m"])) > 1
    elif verb == "train" and "--help" not in arguments:
        check_sampling(configuration.load("train", arguments, TrainConfig))
    else:
        small = {
            "variance": ["num_samples=20", "num_levels=10"],
            "doctor": ["name=new"],
        }  # runs/digits is another run here
        assert console.run([verb, *arguments, *small.get(verb, [])]) == 0
        assert capsys.readouterr().out


def test_there_are_commands_to_test():
    assert sum(runnable(c) for c in COMMANDS) >= 5


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_map_names_every_folder():
    text = (ROOT / "README.md").read_text()
    rows = " ".join(re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE))
    for folder in ("conf", "data", "launch", "benchmarks", "tests", "docs"):
        assert f"`{folder}/`" in rows, folder
    for path in (ROOT / "diffusion_trainer").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"{path.name}/`" in rows, path


def test_the_table_of_the_readme_is_that_of_its_own_run():
    """docs/quickstart.json is the metrics.json of the run whose picture and numbers the README shows."""
    report = json.loads((ROOT / "docs" / "quickstart.json").read_text())
    text = (ROOT / "README.md").read_text()
    for entry in (report["history"][0], report["history"][-1]):
        for shown in (f"{entry['fid']:.2f}", f"{entry['pixel_fd']:.3f}", f"{entry['accuracy']:.1%}"):
            assert shown.replace("%", " %") in text, shown
    assert Path(ROOT / "docs" / "digits.png").is_file()


def test_the_table_of_eta_and_steps_is_that_of_its_sweep_and_has_the_shape_that_it_claims():
    seeds = defaultdict(list)
    with (ROOT / "docs" / "eta_and_steps.csv").open(newline="") as file:
        for r in csv.DictReader(file):
            seeds[r["sampler.solver.eta"], int(r["sampler.num_steps"])].append(float(r["fid"]))
    text = (ROOT / "docs" / "eta_and_steps.md").read_text()
    found = {place: mean(values) for place, values in seeds.items()}
    steps = sorted({count for _, count in found})
    for eta in {eta for eta, _ in found}:
        rows = [(found[eta, count], min(seeds[eta, count]), max(seeds[eta, count])) for count in steps]
        shown = " | ".join(f"{middle:.3f} ({low:.3f} to {high:.3f})" for middle, low, high in rows)
        assert f"| {eta} | {shown} |" in text
        assert found[eta, 5] > found[eta, 10] > found[eta, 20] > found[eta, 50]
    assert all(max(seeds["0", count]) < min(seeds["1", count]) for count in (5, 10, 20))
    assert found["0", 50] < found["1", 50]


def test_the_counts_of_the_readme_are_those_of_conf():
    text = " ".join((ROOT / "README.md").read_text().split())
    names = {
        "schedules": "schedule", "predictions": "prediction", "weightings": "weighting", "objectives": "objective",
        "reverse variances": "variance", "samplers": "sampler", "guidances": "guidance",
    }  # fmt: skip
    for words, group in names.items():
        assert f"{len(list((ROOT / 'conf' / group).glob('*.yaml')))} {words}" in text, words


def test_the_tables_of_reverse_variances_are_those_of_their_sweeps_and_in_the_order_that_they_claim():
    found = {}
    with (ROOT / "docs" / "reverse_variances.csv").open(newline="") as file:
        for r in csv.DictReader(file):
            found[r["measure"], r["variance"], int(r["steps"])] = float(r["value"])
    text = (ROOT / "docs" / "reverse_variances.md").read_text()
    for measure, steps in (("fid", (5, 10, 25)), ("kl_terms", (5, 10, 25, 100)), ("bits_per_dim", (5, 10, 25, 100))):
        for variance in {v for m, v, _ in found if m == measure}:
            shown = " | ".join(f"{found[measure, variance, count]:.3f}" for count in steps)
            assert f"| `{variance}` | {shown} |" in text
        if measure == "bits_per_dim":
            continue
        for count in steps:
            in_order = ["npr", "analytic_diagonal", "analytic"]
            values = [found[measure, variance, count] for variance in in_order]
            assert values == sorted(values)
            assert values[-1] < min(found[measure, fixed, count] for fixed in ("beta", "beta_tilde"))
