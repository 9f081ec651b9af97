"""launch/local_cluster.py as a user starts it: up, used, taken down by another process, with nothing left."""

import subprocess
import sys
import tempfile
from pathlib import Path

import cluster_jobs
from conftest import ROOT

pytestmark = cluster_jobs.MARKS


def script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "local_cluster.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_it_is_up_for_whoever_follows_its_lines_until_it_is_taken_down():
    with tempfile.TemporaryDirectory() as folder:
        up = script("up", "--nodes", "3", "--folder", folder)
        try:
            assert up.returncode == 0, up.stderr
            exported = next(line for line in up.stdout.splitlines() if line.strip().startswith("export "))
            ask = f"{exported}; PATH=$PATH:/usr/sbin; sinfo -h -N -p main -o '%N %t' && srun --nodes=3 hostname"
            found = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
            assert found.returncode == 0, found.stderr
            assert found.stdout.splitlines()[:3] == ["node1 idle", "node2 idle", "node3 idle"]
            assert len(found.stdout.splitlines()) == 6
            again = script("up", "--folder", folder)
            assert again.returncode == 2
            assert f"error: a cluster is up in {folder} already" in again.stderr
        finally:
            down = script("down", "--folder", folder)
        assert (down.returncode, down.stderr) == (0, "")
        assert not cluster_jobs.script().LocalCluster(Path(folder)).processes()
        assert script("down", "--folder", folder).returncode == 0  # of what is down already


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    for name in ("state", "spool", "munge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").touch()
    up = script("up", "--folder", str(tmp_path))
    assert (up.returncode, "has files that are of no cluster" in up.stderr) == (2, True), up.stderr
    assert len([*tmp_path.rglob("mine.txt")]) == 3
    down = script("down", "--folder", str(tmp_path))
    assert (down.returncode, f"there is no cluster in {tmp_path}" in down.stderr) == (2, True), down.stderr


def test_a_path_that_its_configuration_cannot_have_is_refused(tmp_path):
    up = script("up", "--folder", str(tmp_path / "a b"))
    assert (up.returncode, "give another --folder" in up.stderr) == (2, True), up.stderr
    assert not (tmp_path / "a b").exists()
