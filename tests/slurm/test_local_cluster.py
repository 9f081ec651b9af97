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
