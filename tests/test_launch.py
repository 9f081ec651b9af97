"""The sbatch script, with stand-ins for SLURM's commands (tests/slurm runs it on a real one)."""

import os
import subprocess

import pytest
from conftest import ROOT


@pytest.fixture
def cluster(tmp_path):
    """A folder with a .venv that echoes its arguments, and srun and scontrol on the path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    scripts = {
        tools / "scontrol": 'echo "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 State=ALLOCATED"',
        tools / "srun": 'echo "srun $1 at $MASTER_ADDR:$MASTER_PORT"; shift; exec "$@"',
        tmp_path / ".venv" / "bin" / "diffusion-trainer": 'printf "<%s>" "$@"; exit 3',
    }
    for path, text in scripts.items():
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    return environment | {"SLURM_JOB_ID": "41234", "SLURMD_NODENAME": "n1", "SLURM_CPUS_PER_TASK": "4"}


def test_arguments_and_exit_code_pass_through(cluster):
    arguments = ["experiment=digits", "data.shards=a b/*.tar", "network.channel_multipliers=[1,2]"]
    script = ROOT / "launch" / "train.sbatch"
    result = subprocess.run(["bash", script, *arguments], env=cluster, capture_output=True, text=True)
    assert result.returncode == 3, result.stderr
    assert result.stdout.splitlines() == [
        "srun --kill-on-bad-exit=1 at 10.0.0.7:21234",
        "<train><experiment=digits><data.shards=a b/*.tar><network.channel_multipliers=[1,2]>",
    ]


def test_a_checkout_without_set_up_is_named(cluster, tmp_path):
    (tmp_path / ".venv" / "bin" / "diffusion-trainer").unlink()
    result = subprocess.run(["bash", ROOT / "launch" / "train.sbatch"], env=cluster, capture_output=True, text=True)
    assert result.returncode == 2
    assert "run make setup there first" in result.stderr
