"""A run with a checkpoint that starts again on a full disk trains, says what it cannot write, and saves when it can."""

from pathlib import Path

import pytest
import tiny
import torch
from conftest import command, finish
from small_disks import FILLER, NAMES, fill, fill_names, mounted
from undisturbed import numbers, table

from diffusion_trainer.apps import cli as console
from diffusion_trainer.conventions import PassingError
from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


def arguments(shards, folder: Path) -> list[str]:
    """Of a run with a checkpoint after each step of 32 images, that is given room at 160."""
    return [
        *shards, *tiny.NETWORK, "network.attention_levels=[]", "trainer.accelerator=cpu", "num_images=256",
        "callbacks.log.every_n_images=32", "callbacks.checkpoint.keep=1", "callbacks.checkpoint.every_n_images=32",
        "callbacks.evaluate.at_start=false", "callbacks.guard.recent=1",
        "+callbacks.disk={_target_: small_disks.Emptied, at_images: 160}", "allowed_targets=[small_disks]",
        f"folder='{folder}'",
    ]  # fmt: skip


@pytest.fixture
def logger():
    return "csv"


@pytest.fixture
def verb(shards, logger, monkeypatch, capsys):
    """verb(name, folder, *overrides) -> (exit code, output), in this process, which is the run's only one."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)

    def verb(name: str, folder: Path, *overrides: str):
        code = console.run([name, *arguments(shards, folder), "strategy=single", f"logger={logger}", *overrides])
        return code, capsys.readouterr().out

    return verb


@pytest.fixture
def stopped(verb, tmp_path, monkeypatch):
    """The folder, on a small disk, of a run that was stopped after two steps."""
    with mounted(tmp_path / "small", 8192) as disk:
        with monkeypatch.context() as patch:
            patch.setenv("STOP_AT", "32")
            assert verb("train", disk / "run")[0] == 143
        assert Checkpoint(latest(disk / "run" / "checkpoints")).images_seen == 64
        yield disk / "run"


def fill_up(folder: Path, names: bool) -> None:
    """names: until no file can be made any more, not even an empty one."""
    if names:
        (folder / FILLER).touch()
        fill_names(folder / NAMES)
    fill(folder / FILLER)


@pytest.mark.parametrize(("names", "logger"), [(False, "default"), (True, "csv")])
def test_a_restart_on_a_full_disk_trains_on_and_saves_once_there_is_room(verb, stopped, tmp_path, names):
    fill_up(stopped, names)
    code, output = verb("doctor", stopped)
    assert code == 0, output
    assert " error " not in output
    code, output = verb("train", stopped)
    assert code == 0, output
    assert "resuming from images-000000000064" in output
    lost = [f"checkpoints/images-{images:012d} could not be written" in output for images in range(96, 257, 32)]
    assert lost == [True, True, False, False, False, False]
    told = [line for line in output.splitlines() if "WARNING" in line]
    assert len(told) == len(set(told))
    assert verb("train", tmp_path / "alone")[0] == 0
    ours, theirs = (Checkpoint(latest(run / "checkpoints")) for run in (stopped, tmp_path / "alone"))
    assert ours.images_seen == theirs.images_seen == 256
    assert ours.kinds == theirs.kinds
    assert all(torch.equal(t, ours.whole(kind)[n]) for kind in theirs.kinds for n, t in theirs.whole(kind).items())
    assert numbers(table(stopped)) == numbers(table(tmp_path / "alone"))


def test_another_configuration_is_refused_in_one_line_where_it_cannot_be_kept(verb, stopped):
    before = (stopped / "config.yaml").read_text()
    fill_up(stopped, names=False)
    with pytest.raises(PassingError) as refused:
        verb("train", stopped, "num_images=512")
    assert str(refused.value) == (
        f"{stopped}/config.yaml cannot be written (No space left on device), and this configuration is another than "
        "the one there: make room there, and run the same command again"
    )
    assert (stopped / "config.yaml").read_text() == before
    assert {path.name for path in stopped.glob("*config*")} == {"config.yaml"}


def test_ranks_start_where_no_file_can_be_made(shards, tmp_path):
    """Two processes that `train` has started: no folder for their logs, no file for the stacks of a hang."""
    with mounted(tmp_path / "small", 8192) as disk:
        folder = disk / "run"
        given = [*arguments(shards, folder), "strategy=ddp", "trainer.processes=2"]
        code, output = finish(command("train", *given, cwd=tmp_path, STOP_AT="32"))
        assert code == 143, output
        fill_up(folder, names=True)
        code, output = finish(command("train", *given, cwd=tmp_path))
        assert code == 0, output
        for lacking in (
            "attempt-2, for the logs of this start,",
            "rank-1.log",
            "stacks-rank-0.txt",
            "stacks-rank-1.txt",
        ):
            assert output.count(f"{lacking} cannot be written (No ") == 1, lacking
        assert Checkpoint(latest(folder / "checkpoints")).images_seen == 256
