"""A server of Weights & Biases on loopback has each point of a run once in the end, whatever came between."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from conftest import command, finish
from ledgers import tree
from safetensors.torch import load_file
from test_wandb_faults import RUN, services, wait_for, written
from wandb_server import Sent, Server, serving

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps import wandb_sync
from diffusion_trainer.apps.folder_lock import held
from diffusion_trainer.callbacks.loggers import Wandb
from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.training.checkpoints import latest

pytestmark = pytest.mark.slow
IMAGES = "num_images=2400"


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def run(workplace) -> Path:
    return workplace / "runs" / "digits"


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory) -> dict[str, bytes]:
    """What a run without Weights & Biases comes to."""
    place = tmp_path_factory.mktemp("undisturbed")
    (place / "shards").mkdir()
    (place / "shards" / "digits").symlink_to(digits)
    code, output = finish(command(*RUN, IMAGES, "logger.wandb=null", cwd=place))
    assert code == 0, output
    return tensors(place / "runs" / "digits")


def tensors(run: Path) -> dict[str, bytes]:
    """Weights, averages and moments; a restart may write them in another order."""
    read = load_file(latest(run / "checkpoints") / "rank-00000.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in read.items()}


def received(server: Server) -> Sent:
    (sent,) = server.runs.values()
    return sent


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def service_of(process: subprocess.Popen) -> int:
    """Once it is there; other children come and go."""
    found = []

    def there() -> bool:
        with suppress(FileNotFoundError):
            found[:] = services(process.pid)
        return bool(found)

    until(there)
    return found[0]


def killed(process: subprocess.Popen) -> None:
    """All of the run, its service too, as by the loss of a node."""
    for pid in [*services(process.pid), *tree(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    finish(process)


def sync(run: Path, server: Server) -> str:
    code, output = finish(command("wandb-sync", f"run={run}", cwd=run.parent, **server.env | {"WANDB_MODE": "offline"}))
    assert code == 0, output
    return output


def test_an_offline_run_that_was_stopped_and_killed_is_sent_later(workplace, run, server):
    """And once: not again by `wandb sync`. Its id is the checkpoint's where the file is lost."""
    process = command(*RUN, IMAGES, cwd=workplace)
    wait_for(run, 480)
    process.terminate()
    _, output = finish(process)
    assert "offline: `diffusion-trainer wandb-sync run=runs/digits` sends the run" in output
    name = (run / "run_id").read_text()
    (run / "run_id").unlink()
    process = command(*RUN, IMAGES, cwd=workplace)
    wait_for(run, 1120)
    killed(process)
    code, output = finish(command(*RUN, IMAGES, cwd=workplace))
    assert code == 0, output
    assert len(list((run / "wandb").glob("offline-run-*"))) == 3

    assert "150 rows sent" in sync(run, server)
    assert received(server).points() == written(run)
    assert list(server.runs) == [name]
    wandb = [Path(sys.executable).with_name("wandb"), "sync", *(run / "wandb").glob("*run-*")]
    subprocess.run(wandb, env={**os.environ, **server.env}, check=True)
    assert received(server).points() == written(run)


def test_an_online_run_that_is_killed_while_its_server_is_away_is_whole_at_the_end(workplace, run, server, undisturbed):
    """The next start sends the rows that the service had not sent; `wandb-sync`, those that are offline at the end."""
    process = command(*RUN, IMAGES, cwd=workplace, **server.env)
    until(lambda: server.runs and received(server).lines)
    server.become(None)
    sent = len(received(server).lines)
    wait_for(run, 16 * (sent + 40))
    killed(process)
    server.become(200)
    assert len(received(server).lines) == sent
    process = command(*RUN, IMAGES, cwd=workplace, **server.env)
    service = service_of(process)
    until(lambda: len(received(server).lines) > sent)
    os.kill(service, signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert output.count("  WARNING: Weights & Biases") == 1, output
    sync(run, server)
    assert received(server).points() == written(run)
    assert tensors(run) == undisturbed


@pytest.mark.parametrize("status", [None, 500])
def test_a_server_that_fails_after_a_good_start_changes_nothing(workplace, run, server, undisturbed, status):
    """Its end is not waited for, and what it lacks is sent when it is back. None: it never answers."""
    limit = "logger.wandb.finish_timeout_seconds=2"
    process = command(*RUN, IMAGES, limit, cwd=workplace, **server.env)
    until(lambda: server.runs and received(server).lines)
    server.become(status)
    code, output = finish(process)
    assert code == 0, output
    assert "Weights & Biases has not ended within 2 s" in output
    assert tensors(run) == undisturbed
    server.become(200)
    sync(run, server)
    assert received(server).points() == written(run)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say run=runs/<name>"),
        (["run=runs/none"], "no config.yaml in it"),
        (["run=runs/csv"], "its logger is csv"),
        (["run=runs/both"], "wandb login"),
    ],
)
def test_what_cannot_be_sent_is_refused(tmp_path, monkeypatch, arguments, says):
    ended(tmp_path, monkeypatch, is_logged_in=False)
    with pytest.raises(UserError, match=says):
        console.run(["wandb-sync", *arguments])


def ended(place: Path, monkeypatch, is_logged_in: bool) -> None:
    """Runs of which one told W&B."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb_sync, "logged_in", lambda: is_logged_in)
    both = {"wandb": {"_target_": "diffusion_trainer.callbacks.loggers.Wandb", "project": "p"}}
    for name, more in (("csv", {}), ("both", both)):
        logger = {"csv": {"_target_": "diffusion_trainer.callbacks.loggers.Csv"}, **more}
        (place / "runs" / name).mkdir(parents=True)
        (place / "runs" / name / "config.yaml").write_text(yaml.safe_dump({"logger": logger, "name": name}))
        (place / "runs" / name / "run_id").write_text("id")


def test_a_run_that_trains_is_not_sent_and_a_job_may_start_while_its_run_is(tmp_path, monkeypatch, capsys):
    ended(tmp_path, monkeypatch, is_logged_in=True)
    folder = Path("runs/both")
    with (
        held(folder),
        pytest.raises(UserError, match=r"runs/both is training: .* offline it is sent once it has ended"),
    ):
        console.run(["wandb-sync", "run=runs/both"])

    def send(*_):
        with held(folder), pytest.raises(PassingError, match="another process is sending"):  # but not be sent twice
            console.run(["wandb-sync", "run=runs/both"])
        return 7

    monkeypatch.setattr(Wandb, "send", send)
    assert console.run(["wandb-sync", "run=runs/both"]) == 0
    assert "7 rows sent" in capsys.readouterr().out
