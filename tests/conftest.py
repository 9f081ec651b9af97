"""Shared by all tests: the digits, and the console command as a user runs it."""

import fcntl
import gc
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra._internal.config_repository import ConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser

from diffusion_trainer.apps import config

ROOT = Path(__file__).resolve().parents[1]

# A network of some 40 thousand parameters, two processes' worth of lanes, and an evaluation of a second.
SMALL = [
    "network.base_channels=16", "network.blocks_per_level=1", "network.head_channels=16", "network.groups=4",
    "batch_size=16", "lanes=4", "sampler.num_steps=3", "evaluation.num_samples=40", "evaluation.batch_size=20",
    "callbacks.log.every_n_images=16", "logger=csv",
]  # fmt: skip


def pytest_collection_finish(session):
    """What is imported, and some 4,000 items, stay: no full collection of garbage need look through them again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def drawn_anew():
    """What a test draws from torch's own generator does not depend on the tests that its process has run before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def composed_once():
    """Hydra takes a tenth of a second to compose conf/, a third of it to read 30 files, and milliseconds to parse an
    override; a session asks for the same again and again. (Unpickling takes a fifth of the time of a deep copy.)"""

    def once(function, key):
        known = {}

        def remembering(*arguments):
            asked = key(*arguments)
            if asked not in known:
                known[asked] = pickle.dumps(function(*arguments))
            return pickle.loads(known[asked])

        return remembering

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_compose", once(config._compose, lambda verb, given: (config.CONF, verb, *given)))
        patch.setattr(OverridesParser, "parse_rule", once(OverridesParser.parse_rule, lambda self, *words: words))
        load = ConfigRepository.load_config
        load_once = once(load, lambda self, path: (path, *(source.path for source in self.sources)))
        patch.setattr(ConfigRepository, "load_config", lambda self, config_path: load_once(self, config_path))
        yield


@pytest.fixture(scope="session")
def recipe():
    """data/digits.py, which is no package."""
    spec = importlib.util.spec_from_file_location("digits_recipe", ROOT / "data" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that make(folder) has filled: one for all processes of the session. Not to be changed."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one who failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def digits(recipe, tmp_path_factory) -> Path:
    """The folder that the recipe writes. Not to be changed."""

    def make(folder: Path) -> None:
        report = recipe.write(folder / "digits")
        (folder / "digits" / "digits.json").write_text(json.dumps(report))

    return made_once(tmp_path_factory, "made-shards", make) / "digits"


def command(*arguments: str, cwd: Path, **env: str) -> subprocess.Popen:
    """`diffusion-trainer <arguments>` of this checkout, in a folder, its output to be read."""
    ours = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "diffusion_trainer", *arguments],
        cwd=cwd,
        env={**os.environ, **ours, **env},
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
    """A folder with a finished run of one process, runs/digits: this process's copy of it, which tests add to."""

    def make(folder: Path) -> None:
        (folder / "shards").mkdir()
        (folder / "shards" / "digits").symlink_to(digits)
        arguments = ["train", "experiment=digits", *SMALL, "strategy=single", "num_images=32"]
        code, output = finish(command(*arguments, cwd=folder))
        assert code == 0, output

    made = made_once(tmp_path_factory, "made-trained", make)
    return shutil.copytree(made, tmp_path_factory.mktemp("trained") / "copy", symlinks=True)


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory) -> Path:
    """As `workplace`, but one for all runs of a module, which compares them."""
    path = tmp_path_factory.mktemp("runs")
    (path / "shards").mkdir()
    (path / "shards" / "digits").symlink_to(digits)
    return path
