"""A run uses its secrets and writes none of them: every byte of every file that it leaves is searched."""

from pathlib import Path

import pytest
import tiny
from canaries import SECRETS, arguments, leaking
from conftest import ROOT, command, finish

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import rank, submit
from diffusion_trainer.conventions import UserError


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def run(folder: Path, *more: str, **env: str) -> tuple[int, str]:
    paths = f"{ROOT / 'tests'}:{ROOT / 'tests' / 'apps'}"
    return finish(command(*more, cwd=folder, PYTHONPATH=paths, TMPDIR=str(folder / "tmp"), **env))


@pytest.mark.slow
def test_no_file_of_a_run_that_breaks_has_a_secret(secrets, tmp_path, monkeypatch):
    """A sweep, whose points have parents of their own, and a run that torchrun has started."""
    (tmp_path / "tmp").mkdir()
    given = arguments(tmp_path, "single")
    code, swept = run(tmp_path, "train", "-m", *given, "name=swept", "seed=choice(0)")
    assert code == 1, swept
    ranked = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    code, alone = run(tmp_path, "train", *given, "name=alone", **ranked)
    assert code == 1, alone
    assert (swept + alone).count("RuntimeError: no answer from https://***@host/x.tar") >= 2
    monkeypatch.chdir(tmp_path)
    submit.job([*given, "name=alone", "resume.allow_config_change=true"])
    (tmp_path / "output").write_text(swept + alone)

    assert leaking(tmp_path) == {}
    names = {path.name for path in tmp_path.rglob("*")}
    expected = {
        "config.yaml", "sweep.json", "metrics.csv", "job.sbatch", "failed-rank-0.txt", "post-mortem.txt", "rank-0.log",
        "manifest.json", "debug.log",
    }  # fmt: skip
    assert expected <= names, expected - names
    assert [path for path in tmp_path.rglob("run-*.wandb") if path.stat().st_size > 1000]
    assert "${oc.env:STORE_PASSWORD}" in (tmp_path / "runs" / "alone" / "config.yaml").read_text()


def test_the_search_finds_what_is_hidden(tmp_path):
    (tmp_path / "a" / ".b").mkdir(parents=True)
    (tmp_path / "a" / ".b" / "x.bin").write_bytes(b"\0\1canary3\xff")
    (tmp_path / "a" / "canary1").touch()
    assert leaking(tmp_path) == {"a/.b/x.bin": [b"canary3"], "a/canary1": [b"canary1"]}


@pytest.mark.parametrize("verb", ["train", "submit"])
def test_a_secret_that_stands_in_the_configuration_is_refused_and_nothing_is_written(tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    shards = tiny.overrides(tmp_path / "shards")
    before = sorted(tmp_path.rglob("*"))
    literal = configuration.assignment("data.shards", "pipe:curl https://user:canary4@host/train-000000.tar")
    dry = ["dry_run=true"] if verb == "submit" else []
    with pytest.raises(UserError) as error:
        console.run([verb, *shards, literal, *dry])
    assert "data.shards: a password, key or signature would be written into files" in str(error.value)
    assert "data.shards='${oc.env:MY_TOKEN}'" in str(error.value)
    assert "canary4" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def broken(*_) -> None:
    raise UserError("https://host/canary2-of-a-token may not be read")


def test_an_error_that_is_shown_has_no_secrets(monkeypatch, capsys):
    """As the console command shows it, and as a rank does."""
    monkeypatch.setenv("HF_TOKEN", "canary2-of-a-token")
    for patched, main in (
        ("diffusion_trainer.apps.cli.run", console._main),
        ("diffusion_trainer.apps.rank.work", rank.main),
    ):
        monkeypatch.setattr(patched, broken)
        monkeypatch.setattr("diffusion_trainer.apps.config.read", lambda path: {})
        monkeypatch.setattr("sys.argv", ["x", "folder"])
        assert main() == 2
        assert capsys.readouterr().err == "error: https://host/*** may not be read\n"
