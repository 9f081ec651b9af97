"""What a start writes, on a full disk: what is there needs no room, the rest is spared, or refused in one line."""

import errno
import os
from pathlib import Path

import pytest
from small_disks import fill, fill_names, mounted
from written_runs import config_of, write_run

from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps import folder_lock, initial, post_mortem, processes
from diffusion_trainer.apps.doctor_disk import Folder, Saving
from diffusion_trainer.apps.doctor_facts import Run
from diffusion_trainer.apps.findings import Process, examine, judge
from diffusion_trainer.callbacks.attempts import begin
from diffusion_trainer.callbacks.last_words import RankFiles
from diffusion_trainer.callbacks.watchdog import Watchdog
from diffusion_trainer.conventions import PassingError
from diffusion_trainer.evaluation.writing import needed, spared
from diffusion_trainer.training.agreement import Agreement

SHARDS = ["experiment=digits", "evaluation=none", "logger=csv"]
NO_ROOM = "cannot be written (No space left on device)"


@pytest.fixture
def disk(tmp_path):
    with mounted(tmp_path / "small", 4096) as disk:
        (disk / "logs" / "attempt-1").mkdir(parents=True)
        yield disk


def fill_up(disk: Path) -> None:
    """No file can be made any more, and none can grow."""
    (disk / "filler").touch()
    fill_names(disk / "names")
    fill(disk / "filler")


def test_what_is_there_already_needs_no_room_and_what_is_another_is_refused(disk):
    """Both files of a changed configuration, or none."""
    folders.write_config(disk, {"num_images": 1, "resume": {}})
    folders.write_config(disk, {"num_images": 2, "resume": {}})
    folders.write_order(disk, "f")
    before = {path: path.read_bytes() for path in disk.iterdir() if path.is_file()}
    assert {path.name for path in before} == {"config.yaml", "config_changes.txt", "order"}
    fill(disk / "filler")
    folders.write_config(disk, {"num_images": 2, "resume": {}})
    folders.write_order(disk, "f")
    with pytest.raises(PassingError, match=r"config\.yaml cannot be written \(No space left .* another than the one"):
        folders.write_config(disk, {"num_images": 3, "resume": {}})
    with pytest.raises(PassingError, match=r"order cannot be written \(No space left on device\)"):
        folders.write_order(disk, "g")
    (disk / "filler").unlink()
    assert {path: path.read_bytes() for path in disk.iterdir() if path.is_file()} == before


def test_a_change_that_cannot_be_noted_is_not_made(tmp_path):
    folders.write_config(tmp_path, {"num_images": 1, "resume": {}})
    before = (tmp_path / "config.yaml").read_text()
    (tmp_path / f".{folders.CHANGES}.part").symlink_to("/dev/full")
    with pytest.raises(PassingError, match="No space left on device"):
        folders.write_config(tmp_path, {"num_images": 2, "resume": {}})
    assert (tmp_path / "config.yaml").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}
    folders.write_config(tmp_path, {"num_images": 2, "resume": {}})
    assert (tmp_path / folders.CHANGES).read_text().count("num_images: 1 there, 2 here") == 1


def test_the_same_start_again_writes_its_name_no_more(disk, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with folder_lock.held(disk):
        pass
    fill_up(disk)
    with folder_lock.held(disk):
        assert (disk / ".lock").read_text() == "77.0"
    assert capsys.readouterr().out == ""


def test_a_run_that_cannot_even_begin_may_be_tried_again(disk):
    fill_up(disk)
    with pytest.raises(PassingError, match="run cannot be written"), folder_lock.held(disk / "run"):
        pytest.fail("it was held")


def test_a_start_without_a_folder_for_its_logs_has_a_number_all_the_same(disk, capsys):
    fill_up(disk)
    assert begin(disk / "logs") == 2
    assert capsys.readouterr().out == (
        f"  WARNING: {disk}/logs/attempt-2, for the logs of this start, {NO_ROOM}; the run goes on without\n"
    )
    with processes._opened(RankFiles(disk / "logs", 1, 2)) as log:
        assert log is None  # it prints where its parent does


def test_what_cannot_be_put_away_is_not_taken_for_this_start(tmp_path, capsys):
    (tmp_path / "attempt-1").write_text("no folder")
    (tmp_path / "failed-rank-0.txt").write_text("of the start before")
    post_mortem.put_away(tmp_path)
    assert "WARNING: failed-rank-0.txt of the start before, in its" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"attempt-1"}


def test_a_rank_whose_stacks_have_no_file_is_watched_all_the_same(disk, capfd):
    fill_up(disk)
    dog = Watchdog(RankFiles(disk / "logs", 0), 1, lambda: (0, 0))
    dog.start(100.0)
    dog.stop(well=True)
    assert f"stacks-rank-0.txt {NO_ROOM}" in capfd.readouterr().err


def test_initial_weights_that_find_no_room_are_refused_in_one_line(tmp_path, monkeypatch, disk):
    config = config_of(SHARDS)
    write_run(tmp_path / "given", config)
    fill(disk / "filler")
    with pytest.raises(PassingError, match=r"initial\.safetensors cannot be written"):
        initial.write(disk, str(tmp_path / "given"))
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - 65536)
    with pytest.raises(PassingError, match="No space left on device"):  # there is some, but not for the weights
        initial.write(disk, str(tmp_path / "given"))


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_the_doctor_warns_of_a_full_disk_where_the_run_has_a_checkpoint(disk, saved, names):
    """Its first, which does not say yet how long it took."""
    folder = disk / "run"
    config = config_of(SHARDS, f"folder='{folder}'")
    if saved:
        write_run(folder, config)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    fill_up(disk) if names else fill(disk / "filler")
    run, here = Run(config, None, None), Process(0, "here")
    checks = [Saving(run, 120.0), Folder(run)]
    findings = judge(checks, [(here, examine(checks, here, Agreement(alone=True), lambda: 60))])
    assert {f.check for f in findings} == {"saving", "run folder"}
    assert {f.status for f in findings} == {"warning" if saved else "error"}
    assert any("No space left on device" in f.value for f in findings if f.check == "saving")


def test_another_error_of_the_disk_is_said_likewise(capsys):
    def fails(number: int) -> None:
        raise OSError(number, os.strerror(number))

    message = r"x cannot be written \(Disk quota exceeded\), which is needed: make room"
    with pytest.raises(PassingError, match=message), needed(Path("x"), "which is needed"):
        fails(errno.EDQUOT)
    with spared("x"):
        fails(errno.EIO)
    assert capsys.readouterr().out == "  WARNING: x cannot be written (Input/output error); the run goes on without\n"
