"""The benchmark of checkpoints says what it measures, and leaves nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "checkpoints.py"


@pytest.mark.slow
def test_each_is_measured(tmp_path):
    options = ["--millions", "1", "--rounds", "2", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=True, timeout=300)
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [
        "torch.save",
        "training waits",
        "until it is on the disk and read back",
        "copying to memory that was not reserved",
        "reading it at a start",
        "reading a half of each parameter of it",
    ]
    assert all(" of torch.save" in line for line in done.stdout.splitlines())
    assert list(tmp_path.iterdir()) == []
