"""diffusion-trainer doctor as the first step of a job: a process for each node; the node that is spoilt is named."""

import tempfile
from pathlib import Path

import cluster_jobs
import pytest
from conftest import SMALL

pytestmark = cluster_jobs.MARKS
# $TMPDIR is none on the second node alone.
JOB = """#!/bin/bash
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) OMP_NUM_THREADS=1
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
  [ "$SLURM_NODEID" != 1 ] || export TMPDIR=/no/such/folder
  exec .venv/bin/diffusion-trainer doctor "$@"' doctor {arguments} doctor.processes="$SLURM_NTASKS"
"""


@pytest.fixture
def cluster():
    with tempfile.TemporaryDirectory() as folder, cluster_jobs.local_cluster(Path(folder), nodes=3) as cluster:
        yield cluster


def test_the_spoilt_node_is_named(cluster, folder):
    cluster_jobs.prepare(folder)
    arguments = ["experiment=digits", *SMALL, "strategy=zero2", "batch_size=24", "lanes=6", "doctor.slow=0.01",
                 "doctor.slow_network=0.01"]  # fmt: skip
    (folder / "job.sh").write_text(JOB.format(arguments=" ".join(arguments)))
    sbatch = ["sbatch", "--parsable", "--nodes=3", "--ntasks-per-node=2", "--output=log", "job.sh"]
    job = cluster.run(*sbatch, cwd=folder).strip()
    path = folder / "log"
    cluster_jobs.until(lambda: cluster.job(job)["JobState"] in cluster_jobs.OVER, path.read_text, 300)
    log = path.read_text()
    assert cluster.job(job)["ExitCode"] == "1:0", log
    assert "looked at by 3 processes on 3 nodes" in log
    assert "24 = 6 processes x 1 micro-batch x 4, 6 lanes" in log
    assert "3 nodes agree to" in log
    assert "node to node" in log
    wrong = [line for line in log.splitlines() if line.startswith(("  error", "  warning"))]
    assert len(wrong) == 1, log
    assert wrong[0].startswith("  error    $TMPDIR     FileNotFoundError")
    assert wrong[0].endswith("[node2]")
    assert "\n1 error\n" in log
