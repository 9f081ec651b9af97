"""A job of SLURM that was submitted from a shell with secrets, uses them and breaks, writes none of them anywhere."""

import re
import tempfile
from pathlib import Path

import canaries
import cluster_jobs
import pytest
from cluster_jobs import OVER, until
from conftest import ROOT, command, finish

pytestmark = cluster_jobs.MARKS


@pytest.fixture
def cluster():
    with tempfile.TemporaryDirectory() as place, cluster_jobs.local_cluster(Path(place)) as cluster:
        yield cluster


def test_no_file_of_a_job_that_crashes_on_two_nodes_and_comes_back_has_a_secret(cluster, tmp_path):
    """Looked for when it has crashed and waits in the queue, and when it is done."""
    (tmp_path / "tmp").mkdir()
    paths = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'apps'}"
    env = {**canaries.SECRETS, "SLURM_CONF": str(cluster.conf), "PYTHONPATH": paths, "TMPDIR": str(tmp_path / "tmp")}
    given = ["launcher=local_cluster", "name=leaky", *canaries.arguments(tmp_path, "zero2")]
    code, output = finish(command("submit", *given, cwd=tmp_path, **env))
    assert code == 0, output
    number, run = re.match(r"job (\d+) is submitted", output)[1], tmp_path / "runs" / "leaky"
    log, starts = (run / "logs" / f"slurm-{number}.{kind}" for kind in ("log", "starts"))
    said = lambda: log.read_text() if log.is_file() else ""  # noqa: E731
    until(lambda: cluster.job(number)["Restarts"] == "1", said, 300)
    assert starts.is_file()
    assert canaries.leaking(tmp_path) == {}
    until(lambda: cluster.job(number)["JobState"] in OVER, said, 300)
    (tmp_path / "output").write_text(output)
    assert canaries.leaking(tmp_path) == {}

    assert (cluster.job(number)["JobState"], said().count("looked at by 2 processes on 2 nodes")) == ("COMPLETED", 2), (
        said()
    )
    (screen,) = re.findall(r"^post-mortem of .*?(?=back into the queue)", said(), re.MULTILINE | re.DOTALL)
    assert "RuntimeError: no answer from https://***@host/x.tar" in screen
    assert f"  cd {tmp_path} && diffusion-trainer submit launcher=local_cluster name=leaky " in screen
    names = {path.name for path in run.rglob("*")}
    expected = {
        "config.yaml", "metrics.csv", "job.sbatch", "post-mortem.txt", "rank-0.log", "rank-1.log",
        "attempt-1", "attempt-2", "manifest.json", "debug.log", log.name,
    }  # fmt: skip
    assert expected <= names, expected - names
    assert [path for path in run.rglob("run-*.wandb") if path.stat().st_size > 1000]
