"""Shared by all tests: the digits, and the console command as a user runs it."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion_trainer.apps import config

ROOT = Path(__file__).resolve().parents[1]

# A network of some 40 thousand parameters, two processes' worth of lanes, and an evaluation of a second.
SMALL = [
    "network.base_channels=16", "network.blocks_per_level=1", "network.head_channels=16", "network.groups=4",
    "batch_size=16", "lanes=4", "sampler.num_steps=3", "evaluation.num_samples=40", "evaluation.batch_size=20",
    "callbacks.log.every_n_images=16", "logger=csv",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def composed_once():
    """Hydra takes a tenth of a second to compose conf/, and a session asks for the same again and again."""
    known, compose = {}, config._compose

    def once(verb: str, overrides: list[str]):
        key = (config.CONF, verb, *overrides)
        if key not in known:
            known[key] = compose(verb, overrides)
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_compose", once)
        yield


@pytest.fixture(scope="session")
def recipe():
    """data/digits.py, which is no package."""
    spec = importlib.util.spec_from_file_location("digits_recipe", ROOT / "data" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def digits(recipe, tmp_path_factory) -> Path:
    """The folder that the recipe writes."""
    out = tmp_path_factory.mktemp("shards") / "digits"
    report = recipe.write(out)
    (out / "digits.json").write_text(json.dumps(report))
    return out


def command(*arguments: str, cwd: Path, **env: str) -> subprocess.Popen:
    """`diffusion-trainer <arguments>` in a folder, its output to be read."""
    return subprocess.Popen(
        [sys.executable, "-m", "diffusion_trainer", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=500)
    finally:
        process.kill()  # nothing, where it has ended
    return process.returncode, output


@pytest.fixture
def workplace(digits, tmp_path) -> Path:
    """An empty folder with the digits where the configuration expects them."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "digits").symlink_to(digits)
    return tmp_path


@pytest.fixture
def cli(workplace):
    """cli(*arguments) -> (exit code, output)."""
    return lambda *arguments, **env: finish(command(*arguments, cwd=workplace, **env))


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory) -> Path:
    """A folder with a finished run of one process, runs/digits. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "shards").mkdir()
    (folder / "shards" / "digits").symlink_to(digits)
    code, output = finish(command("train", "experiment=digits", *SMALL, "strategy=single", "num_images=32", cwd=folder))
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory) -> Path:
    """As `workplace`, but one for all runs of a module, which compares them."""
    path = tmp_path_factory.mktemp("runs")
    (path / "shards").mkdir()
    (path / "shards" / "digits").symlink_to(digits)
    return path
