"""docs/data.md: its commands and programs run, in their order, in a folder that has what it calls yours."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT
from scripts import picture

from diffusion_trainer.streaming.index import read_index
from diffusion_trainer.streaming.scanning import scan

GUIDE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def home(tmp_path) -> Path:
    (tmp_path / "data").symlink_to(ROOT / "data")
    for i in range(6):
        path = tmp_path / "my" / "photos" / ("cat", "dog")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i, (64, 48), format="jpeg"))
    (tmp_path / "my" / "shards").mkdir()
    with tarfile.open(tmp_path / "my" / "shards" / "a.tar", "w") as tar:
        tar.add(tmp_path / "my" / "photos" / "cat" / "0.jpg", "0.jpg")
    return tmp_path


def commands(shell: str) -> list[str]:
    """Its lines, without the installation, which a test has no network for."""
    return [line for line in shell.splitlines() if line and not line.startswith("pip ")]


def test_every_block_is_of_a_kind_that_is_tried():
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}
    assert len(BLOCKS) >= 7


@pytest.mark.slow
def test_the_guide_works_from_top_to_bottom(home):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (home / "my" / "captions").mkdir()
    images = [picture(i, (8, 8), format="png") for i in range(5)]
    table = arrow.table({"image": images, "text": [f"number {i}" for i in range(5)], "score": list(range(5))})
    parquet.write_table(table, home / "my" / "captions" / "part-0.parquet")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for kind, block in BLOCKS:
        (home / "program.py").write_text(block)  # TorchScript reads the source from its file
        for command in [["python", "program.py"]] if kind == "python" else [["sh", "-c", c] for c in commands(block)]:
            done = subprocess.run(
                command, cwd=home, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=200, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{command[-1]}\n{done.stdout}"
    folders = {p.parent for p in home.rglob("*.tar")}
    counts = {str(f.relative_to(home)): sum(s.samples for s in read_index(f / "index.json")) for f in folders}
    assert counts == {
        "shards/shapes": 1200, "shards/shapes-latents": 1000, "shards/photos": 6, "shards/small": 6,
        "shards/captions": 5, "shards/latents": 1000, "shards/scaled": 1000, "shards/numbers": 100, "my/shards": 1,
    }  # fmt: skip
    assert all(scan(tar).damage is None for tar in home.rglob("*.tar"))
