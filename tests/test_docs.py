"""What the README and the docs show is true: commands run, links and folders exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from diffusion_trainer.apps import cli as console

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "conf").rglob("*.yaml"))]
COMMANDS = sorted(
    {c for p in PAGES for c in re.findall(r"diffusion-trainer ((?:train|sample|evaluate) [^`\n&]+)", p.read_text())}
)


def runnable(command: str) -> bool:
    return "..." not in command and ":" not in command and "<" not in command


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if runnable(c)])
def test_every_command_shown_works(command, trained, monkeypatch, capsys):
    """Training commands are composed and checked to the last value; the others are run, on a small model."""
    monkeypatch.chdir(trained)
    verb, *arguments = shlex.split(command)
    if verb == "train" and "--help" not in arguments:
        arguments.append("--config")
    assert console.run([verb, *arguments]) == 0
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
