"""diffusion-trainer doctor: a healthy run is found healthy, and each thing that is spoilt is found, with its remedy."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL
from written_runs import config_of, write_run

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps import doctor
from diffusion_trainer.apps.doctor import LAST_SECONDS, MEETING_SECONDS, Settings, bounded
from diffusion_trainer.apps.doctor_disk import TemporaryFiles, bytes_of_checkpoints, last_save, speed_of
from diffusion_trainer.apps.doctor_facts import scratch
from diffusion_trainer.apps.doctor_run import CONFIG_SECONDS, unreachable
from diffusion_trainer.apps.findings import Check, Process, examine, judge
from diffusion_trainer.apps.meeting import Absent, meeting
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks.checkpointing import SAVE_SECONDS
from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoint_files import MANIFEST, write_manifest

pytestmark = pytest.mark.slow

DIGITS = ["experiment=digits", *SMALL]
ALONE = Process(0, "here")


@pytest.fixture(autouse=True)
def _here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def found(tmp_path, capsys):
    """found(*arguments) -> (exit code, the findings that are not ok, all of them, what is on the screen)."""

    def run(*arguments: str):
        code = console.run(["doctor", *DIGITS, f"out='{tmp_path}/report.json'", *arguments])
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["exit_code"] == code
        findings = report["findings"]
        return code, [f for f in findings if f["status"] != "ok"], findings, capsys.readouterr().out

    return run


def test_a_healthy_run_is_healthy_and_leaves_nothing_behind(found, workplace):
    before = sorted(workplace.rglob("*"))
    code, wrong, findings, screen = found("logger=default")
    assert (code, wrong) == (0, [])
    names = ["versions", "devices", "matmul", "batch", "data", "config", "cores", "memory", "open files", "$TMPDIR",
             "/dev/shm", "wandb", "saving", "run folder"]  # fmt: skip
    assert [f["check"] for f in findings] == names
    assert "16 = 2 processes x 1 micro-batch x 8, 4 lanes, 6,400 steps" in screen
    assert "1,500 samples in 6 shards" in screen
    assert screen.rstrip().endswith("all is well")
    assert {p for p in workplace.rglob("*") if p.name != "report.json"} == set(before)


def test_the_configuration_is_that_of_train(found, capsys):
    assert console.run(["doctor", "--help"]) == 0
    shown = capsys.readouterr().out
    for text in ("clock_seconds: 1.0", "num_images: 1000000", "schedule=cosine"):
        assert text in shown
    with pytest.raises(UserError, match=r"did you mean optimizer\.lr"):
        found("optimizer.lrr=1")
    with pytest.raises(UserError, match=r"did you mean doctor\.slow"):
        found("doctor.slo=1")
    with pytest.raises(UserError, match=r"shares in \(0, 1\]"):
        found("doctor.slow=1.5")


def test_a_batch_that_does_not_divide_is_said_once_and_train_would_refuse(found):
    code, wrong, findings, _ = found("doctor.processes=6")
    assert (code, [f["check"] for f in wrong]) == (2, ["batch"])
    assert "use a multiple of 6" in wrong[0]["remedy"]
    assert "matmul" in [f["check"] for f in findings]  # the machine is looked at all the same


def test_processes_of_other_nodes_are_none_of_this_one(found):
    """Two nodes of two processes, asked on a login node."""
    _, wrong, _, _ = found("doctor.processes=4", "trainer.processes=2")
    assert "batch" not in [f["check"] for f in wrong]


def test_shards_that_are_not_there(found):
    code, wrong, _, _ = found("data.shards='nothing/*.tar'")
    assert (code, [f["check"] for f in wrong]) == (2, ["data"])
    assert "no file matches nothing/*.tar" in wrong[0]["remedy"]


@pytest.mark.parametrize(("spoil", "status"), [("remove", "error"), ("zero", "warning")])
def test_a_shard_that_is_gone_or_damaged_is_named(found, digits, tmp_path, spoil, status):
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in digits.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    last = mine / "train-000005.tar"
    if spoil == "remove":
        last.unlink()
    else:
        data = bytearray(last.read_bytes())
        data[:1536] = bytes(1536)
        last.write_bytes(data)
    _, wrong, _, _ = found(f"data.shards='{mine}/train-{{000000..000005}}.tar'")
    assert [(f["check"], f["status"]) for f in wrong] == [("data", status)]
    assert "train-000005.tar" in wrong[0]["value"]
    assert "diffusion-trainer in" in wrong[0]["remedy"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    path = tmp_path / "small"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", path], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"only who may mount can have a small file system here: {made.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_that_is_too_small_or_full(found, small_disk):
    code, wrong, _, _ = found(f"folder='{small_disk}/run'")
    assert code == 1
    assert {f["check"] for f in wrong} == {"run folder", "saving"}
    room = next(f for f in wrong if f["check"] == "run folder")
    assert "for checkpoints" in room["value"]
    assert "choose another folder" in room["remedy"]
    (small_disk / "full").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))
    _, wrong, _, _ = found(f"folder='{small_disk}/run'")
    said = {f["check"]: f["value"] for f in wrong}
    assert "No space left on device" in said["saving"]
    assert f"0 B free in {small_disk}" in said["run folder"]
    assert sorted(p.name for p in small_disk.iterdir()) == ["full"]


def test_a_signal_that_leaves_less_time_than_a_first_save_will_take(found):
    """Nothing has been saved yet that `submit` could go by: it is a guess."""
    code, wrong, _, _ = found("doctor.signal_lead_seconds=0.0001")
    assert (code, [(f["check"], f["status"]) for f in wrong]) == (0, [("saving", "warning")])
    assert "submit signal_lead_seconds=60 (by hand LEAD=60 sbatch --signal=TERM@60 ...)" in wrong[0]["remedy"]


def test_a_save_of_the_run_counts_for_more_than_a_guess(found):
    folder = Path("runs/measured")
    _, checkpoint = write_run(folder, config_of([*DIGITS, "name=measured"]), images=32)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["crc32"]
    write_manifest(checkpoint, manifest | {"state": {SAVE_SECONDS: 150.0}})
    assert last_save(folder) == 150
    code, wrong, _, _ = found(f"folder={folder}")
    assert (code, [(f["check"], f["status"]) for f in wrong]) == (1, [("saving", "error")])
    assert "took 150 s the last time" in wrong[0]["value"]
    assert found(f"folder={folder}", "doctor.signal_lead_seconds=301")[0] == 0
    shutil.rmtree(folder)


def test_what_any_file_takes_is_told_from_what_its_bytes_do():
    speed, latency, small, large = 1e9, 0.5, 1e6, 16e6
    seconds = [latency + size / speed for size in (small, large)]
    assert speed_of(small, seconds[0], large, seconds[1]) == (pytest.approx(speed), pytest.approx(latency))
    assert speed_of(small, 0.5, large, 0.4) == (large / 0.4, 0)


def test_a_folder_that_nobody_can_write_to_is_said_with_its_room(found):
    _, wrong, _, _ = found("folder=/proc/run")
    said = [f["value"] for f in wrong if f["check"] == "run folder"]
    assert len(said) == 2
    assert "FileNotFoundError" in said[0]
    assert "0 B free in /proc" in said[1]


def test_tmpdir_is_tried_even_where_python_would_take_another(small_disk, monkeypatch):
    check = TemporaryFiles(compiles=False)
    monkeypatch.setenv("TMPDIR", str(small_disk))
    one = judged(check, check.measure(ALONE, Agreement()))
    assert one.status == "warning"
    assert "export TMPDIR" in one.remedy
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    measured = examine([check], ALONE, Agreement(), lambda: 10)
    (one,) = judge([check], [(ALONE, measured)])
    assert (one.status, one.remedy) == ("error", check.mend)
    assert "FileNotFoundError" in one.value


def judged(check: Check, value):
    (one,) = check.judge([(ALONE, value)])
    return one


def test_what_a_kill_leaves_keeps_no_run_from_beginning(tmp_path):
    """A run may begin in an empty folder, and in one that has logs."""
    folder = tmp_path / "run"
    with scratch(folder) as path:
        assert path.parent == tmp_path
    folder.mkdir()
    with scratch(folder) as path:
        assert path.parent == folder / "logs"
    assert list((folder / "logs").iterdir()) == []


def test_checkpoints_that_a_run_takes_away_meanwhile_count_no_more(tmp_path, monkeypatch):
    """The first file that is looked at takes its folder with it, and so does the first folder that is listed."""
    names = [f"images-{n}" for n in range(4)]
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "a").write_bytes(bytes(10))
    assert bytes_of_checkpoints(tmp_path, "checkpoints") == 40
    listed, looked_at, scandir, stat = [], [], os.scandir, Path.stat

    def list_folder(path):
        if "images-" in str(path) and not listed.append(path) and len(listed) == 1:
            shutil.rmtree(path)
        return scandir(path)

    def look_at(path, **how):
        if path.name == "a" and not looked_at.append(path) and len(looked_at) == 1:
            shutil.rmtree(path.parent)
        return stat(path, **how)

    monkeypatch.setattr(os, "scandir", list_folder)
    monkeypatch.setattr(Path, "stat", look_at)
    assert bytes_of_checkpoints(tmp_path, "checkpoints") == 20


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_server_of_curves_that_does_not_answer(found, monkeypatch):
    monkeypatch.setattr("diffusion_trainer.apps.doctor_run.server", lambda: f"http://127.0.0.1:{closed_port()}")
    code, wrong, _, _ = found("logger=default", "logger.wandb.mode=online")
    assert (code, [(f["check"], f["status"]) for f in wrong]) == (0, [("wandb", "warning")])  # the run goes on without
    assert "Connection refused" in wrong[0]["value"]
    assert "logger.wandb.mode=offline" in wrong[0]["remedy"]


def test_the_server_is_the_one_of_wandb():
    """In a process of its own: wandb reads the variable once."""
    program = "from diffusion_trainer.callbacks.loggers import server; print(server())"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9"}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "http://127.0.0.1:9"


def test_a_server_that_answers_whatever_is_reachable_and_a_silent_one_is_not():
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *arguments):
            return None

    with HTTPServer(("127.0.0.1", 0), NotFound) as web:
        threading.Thread(target=web.handle_request, daemon=True).start()
        assert unreachable(f"http://127.0.0.1:{web.server_port}") is None
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "timed out" in unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_seconds=0.2)


def test_the_time_for_all_is_kept(found):
    code, wrong, _, _ = found("doctor.timeout_seconds=0.001")
    assert code == 0
    assert len(wrong) > 5
    assert all("not looked at" in f["value"] for f in wrong)


def test_the_times_of_all_its_parts_add_up_to_less_than_a_minute():
    """Even of a process that rank 0 comes to last: they find each other in the time for all."""
    assert CONFIG_SECONDS + MEETING_SECONDS < 2 * MEETING_SECONDS <= Settings().timeout_seconds
    assert Settings().timeout_seconds + LAST_SECONDS < 60


def test_a_process_that_waits_for_ever_is_ended_and_one_that_does_not_is_left_alone(monkeypatch):
    calls = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *given, **how: calls.append((given, how)))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: calls.append("cancelled"))
    with pytest.raises(ZeroDivisionError), bounded(55):
        raise ZeroDivisionError
    assert calls == [((55,), {"exit": True}), "cancelled"]


@pytest.fixture
def port(monkeypatch):
    port = closed_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def test_processes_that_do_not_come_are_named(port, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    with pytest.raises(Absent, match=r"2 of 3 processes did not come within 0 s: rank 1, rank 2; .* are on node1"):
        meeting(World(0, 3, 3, False), 0.3, 5)
    with pytest.raises(Absent, match=f"rank 2 on node1 cannot reach rank 0 at 127.0.0.1:{port}"):
        meeting(World(2, 3, 3, False), 0.3, 5)


def test_processes_that_come_too_late_keep_the_run_from_no_node(monkeypatch, capsys):
    def absent(*_):
        raise Absent("1 of 2 processes did not come")

    monkeypatch.setattr(doctor, "meeting", absent)
    assert console.run(["doctor", *DIGITS]) == 0
    assert "warning: the doctor has not looked: 1 of 2 processes did not come" in capsys.readouterr().err


def test_two_processes_look_at_each_other(workplace):
    process = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*process, "diffusion_trainer", "doctor", *DIGITS, "strategy=zero2", "doctor.slow=0.01", "out=two.json"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "looked at by 2 processes on " in done.stdout
    assert "equal on 2 processes" in done.stdout
    assert "gloo over 2 processes" in done.stdout
    assert done.stdout.count("doctor:") == 1
    report = json.loads(Path("two.json").read_text())
    assert [p["rank"] for p in report["processes"]] == [0, 1]
    assert all(torch.tensor(p["measured"]["matmul"][0][1]) > 0 for p in report["processes"])
