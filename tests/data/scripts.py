"""The recipes of data/, which is no package: imported, called, and run as a user runs them."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import ROOT
from PIL import Image

DATA = ROOT / "data"
sys.path.insert(0, str(DATA))  # as Python does for a script there

import encode_latents  # noqa: E402
import encoders  # noqa: E402
import image_folder  # noqa: E402
import parquet_captions  # noqa: E402
import shapes  # noqa: E402

from diffusion_trainer.streaming.writing import script  # noqa: E402

__all__ = [
    "call",
    "encode_latents",
    "encoders",
    "image_folder",
    "parquet_captions",
    "picture",
    "shapes",
    "start",
    "tars",
]


def call(module, monkeypatch, *arguments: object) -> int:
    """The exit code of `python data/<module>.py <arguments>`, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    try:
        return script(module.main)
    except SystemExit as refused:  # argparse
        return refused.code


def start(name: str, *arguments: object, cwd: Path, **env: str) -> subprocess.Popen:
    """`python data/<name>.py <arguments>`, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(DATA / f"{name}.py"), *map(str, arguments)],
        cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def tars(folder: Path) -> dict[str, bytes]:
    """What a set of shards is, without the hidden files of an unfinished one."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


def picture(seed: int, size: tuple[int, int] = (20, 30), mode: str = "RGB", **save) -> bytes:
    """An image file; `save` says of what format."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size).convert(mode).save(file, **save)
    return file.getvalue()
