"""What the tests of shards at URLs share: three shards, impatient stores, and what a store gives of its samples."""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from streaming import flaky

from diffusion_trainer.streaming.cached import CachedStore
from diffusion_trainer.streaming.damage import Damage
from diffusion_trainer.streaming.index import Shard
from diffusion_trainer.streaming.samples import Samples
from diffusion_trainer.streaming.stores import Store
from diffusion_trainer.streaming.writer import write_shards

PIECE = 8192
MODES = pytest.mark.parametrize("piece_bytes", [None, PIECE], ids=["whole", "pieces"])
NAMES = [f"x-{k:06d}.tar" for k in range(3)]
FIRST = f"/{NAMES[0]}"


def three_shards(out: Path) -> Path:
    """Three shards of ten samples."""
    draws = np.random.default_rng(0)
    samples = [{"__key__": f"{i:04d}", "bin": draws.bytes(700 + 50 * i), "cls": b"%d" % i} for i in range(30)]
    write_shards(iter(samples), out, "x", 10)
    return out


def maker(folder: Path) -> Callable[..., CachedStore]:
    """make(piece_bytes, **options): a store that caches in the folder, and has little patience."""

    def store(piece_bytes: int | None = None, **options) -> CachedStore:
        chosen = {"retries": 3, "backoff_seconds": 0.001, "timeout_seconds": 20.0, "cache_bytes": 1 << 20, **options}
        return CachedStore(str(folder / "cache"), piece_bytes=piece_bytes, **chosen)

    return store


def gets(folder: Path, name: str, piece_bytes: int | None) -> int:
    """Requests that fetch all samples of a shard."""
    end = int(np.fromfile(folder / f"{name}.idx", "<u8")[-1])
    return -(-end // piece_bytes) if piece_bytes else 1


def contents(store: Store, pattern: str) -> list[bytes]:
    """All samples, in order; damage by its kind."""
    shards = store.find(pattern)
    samples, found = Samples(shards, store, 1 << 20), []
    for k, shard in enumerate(shards):
        for i in range(shard.samples):
            try:
                found.append(bytes(samples.bytes_of(k, i)))
            except Damage as damage:
                found.append(damage.kind.encode())
    return found


ILL = {
    "500": flaky.status(500),
    "503": flaky.status(503, Retry_After="0"),
    "429": flaky.status(429, Retry_After="0"),
    "reset": flaky.reset,
    "stall": flaky.stall,
    "short read": flaky.short,
    "html": flaky.page,
    "empty": flaky.empty,
    "half": flaky.half,
    "longer": flaky.longer,
    "404": flaky.missing,
}


def patience(kind: str) -> float:
    """Seconds until a stall is one; too few for a machine under load make more of them."""
    return 0.2 if kind in ("stall", "silent") else 20.0


def spans(store: CachedStore, pattern: str) -> list[tuple[Shard, int, int]]:
    return [
        (shard, int(a), int(b))
        for shard in store.find(pattern)
        for a, b in pairwise(np.frombuffer(store.sidecar(shard, ".idx"), "<u8"))
    ]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)
