"""What a session tells a server that has some of it already, or takes none of it."""

import shutil
from pathlib import Path

import pytest
import wandb
from PIL.Image import Image, new
from wandb_server import serving

from diffusion_trainer.callbacks.loggers import Wandb
from diffusion_trainer.callbacks.wandb_files import history, identity, points, points_of, records
from diffusion_trainer.callbacks.wandb_session import OFFLINE, ONLINE, Session
from diffusion_trainer.conventions import PassingError
from diffusion_trainer.evaluation import pictures
from diffusion_trainer.evaluation.pictures import METRIC

pytestmark = pytest.mark.slow

CHOICE = Wandb("project", finish_timeout_seconds=10)
RUN = ("name", "id", {})


@pytest.fixture
def server(monkeypatch):
    with serving() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()  # whatever this process has asked before with other settings
        yield server
        wandb.teardown()


def offline(folder: Path, *rows: dict) -> None:
    session = Session(folder, OFFLINE, lambda mode: CHOICE._begin(folder, *RUN, mode))
    for row in rows:
        session.log(row)
    session.run.finish()
    wandb.teardown()


def send(folder: Path) -> int:
    try:
        return CHOICE.send(folder, *RUN)
    finally:
        wandb.teardown()


def write(folder: Path, *images: int) -> None:
    (folder / "metrics.csv").write_text("images_seen,loss\n" + "".join(f"{at},{at / 4}\n" for at in images))


def marked(folder: Path) -> list[bool]:
    """Of each session, whether `wandb sync` leaves it out (and `wandb sync --clean` removes it)."""
    return [path.with_name(f"{path.name}.synced").is_file() for path in records(folder)]


def drawn(folder: Path, images_seen: int) -> Image:
    """As an evaluation leaves it in the run's folder."""
    picture = new("L", (8, 8), images_seen)
    pictures.save(picture, pictures.of_evaluation(folder, images_seen))
    return picture


def test_pictures_and_numbers_that_were_told_offline_are_sent_once(tmp_path, server):
    picture = drawn(tmp_path, 16)
    offline(tmp_path, {"images_seen": 16, "loss": 4.0}, {"images_seen": 16, METRIC: picture})
    assert points(tmp_path) == {(16, "loss"), (16, METRIC)}
    write(tmp_path, 16)
    assert [send(tmp_path) for _ in range(2)] == [1, 0]
    (row,) = server.runs["id"].rows()
    assert row[METRIC]["_type"] == "image-file"
    assert server.runs["id"].points() == {(16, METRIC): 1, (16, "loss"): 1}
    assert marked(tmp_path)[:2] == [True, True]


@pytest.mark.parametrize("mode", [OFFLINE, ONLINE])
def test_a_picture_that_a_killed_session_did_not_tell_is_made_up_for(tmp_path, server, monkeypatch, mode):
    """But not one that is beyond the start, nor one that a power cut has torn."""
    monkeypatch.setenv("WANDB_MODE", mode)
    offline(tmp_path, {"images_seen": 16, METRIC: drawn(tmp_path, 16)}, {"images_seen": 16, "loss": 4.0})
    for images_seen in (32, 48, 64):
        drawn(tmp_path, images_seen)
    pictures.of_evaluation(tmp_path, 48).write_bytes(bytes(100))
    (tmp_path / "samples" / "images-best.png").touch()
    write(tmp_path, 16, 32, 48, 64)
    CHOICE.build(tmp_path, *RUN, started_at=48).finalize("success")
    assert points(tmp_path) == {(16, METRIC), (32, METRIC), *((at, "loss") for at in (16, 32, 48))}
    told = [point for path in records(tmp_path)[-1:] for row in history(path) for point in points_of(row)]
    assert ((16, METRIC) in told) == (mode == ONLINE)
    assert len(told) == len(set(told))


def test_rows_that_did_not_arrive_are_no_success_and_are_sent_the_next_time(tmp_path, server):
    choice = Wandb("project", finish_timeout_seconds=0.1)
    write(tmp_path, 16, 32)
    offline(tmp_path, {"images_seen": 16, "loss": 4.0})
    server.refused = "/file_stream"
    with pytest.raises(PassingError, match=r"2 rows were sent to .*, and 2 have not arrived"):
        choice.send(tmp_path, *RUN)
    wandb.teardown()
    assert marked(tmp_path) == [False, False]
    server.refused = ""
    assert send(tmp_path) == 2
    assert server.runs["id"].points() == {(16, "loss"): 1, (32, "loss"): 1}


def removed(folder: Path) -> None:
    shutil.rmtree(folder / "wandb")


def torn(folder: Path) -> None:
    """As by a power cut."""
    (path,) = records(folder)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("lose", [removed, torn])
def test_rows_that_no_record_has_are_asked_of_the_server(tmp_path, server, lose):
    """By `wandb-sync` and by the next start alike."""
    write(tmp_path, 16, 32, 48)
    assert send(tmp_path) == 3
    lose(tmp_path)
    write(tmp_path, 16, 32, 48, 64)
    assert send(tmp_path) == 1
    removed(tmp_path)
    write(tmp_path, 16, 32, 48, 64, 80)
    CHOICE.build(tmp_path, *RUN, started_at=80).finalize("success")
    assert server.runs["id"].points() == {(at, "loss"): 1 for at in (16, 32, 48, 64, 80)}


def test_a_server_that_does_not_tell_its_rows_is_sent_nothing(tmp_path, server, capsys):
    """A start goes on offline, so that nothing is sent twice, and nothing lost."""
    write(tmp_path, 16)
    assert send(tmp_path) == 1
    removed(tmp_path)
    write(tmp_path, 16, 32)
    server.forgets = True
    with pytest.raises(PassingError, match="1 of the 1 rows that the server has are neither in wandb/ nor told by it"):
        send(tmp_path)
    CHOICE.build(tmp_path, *RUN, started_at=32).finalize("success")
    assert "nor told by it, and might be sent twice), and goes on offline" in capsys.readouterr().out
    assert server.runs["id"].points() == {(16, "loss"): 1}
    server.forgets = False
    assert send(tmp_path) == 1
    assert server.runs["id"].points() == {(16, "loss"): 1, (32, "loss"): 1}


def test_a_run_stays_in_the_group_of_its_sweep_when_it_is_sent_later(tmp_path, server, monkeypatch):
    with monkeypatch.context() as sweep:
        for name, value in {"RUN_GROUP": "sweep", "TAGS": "a,b", "JOB_TYPE": "train", "NOTES": "first"}.items():
            sweep.setenv(f"WANDB_{name}", value)
        offline(tmp_path, {"images_seen": 16, "loss": 4.0})
    offline(tmp_path, {"images_seen": 32, "loss": 8.0})
    assert identity(tmp_path) == {"group": "sweep", "tags": ["a", "b"], "job_type": "train", "notes": "first"}
    write(tmp_path, 16, 32)
    assert send(tmp_path) == 2
    assert server.runs["id"].said == {"groupName": "sweep", "tags": ["a", "b"], "jobType": "train", "notes": "first"}
