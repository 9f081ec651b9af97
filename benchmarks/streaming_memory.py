"""Whether the memory of our workers stays where it is.

    python benchmarks/streaming_memory.py [--samples 1000000] [--only latents,jpeg] [--data FOLDER] [--remote]

The sets of benchmarks/streaming.py, one epoch after the other, two workers. Megabytes (2^20 bytes) after each tenth of
the samples: what the larger worker and this process have of their own, and what they share. --remote: the shards come
from an HTTP server of this machine, through a cache with room for half of them (one lane and a window of a shard, or
the samples of a batch would be in more of them than that).
"""

import argparse
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from subprocess import DEVNULL, Popen

import psutil
from streaming_contenders import LANES, SETS, Set, make

from diffusion_trainer.streaming.arrays import Label
from diffusion_trainer.streaming.cached import CachedStore
from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.stores import LocalStore, Store

WORKERS = 2
STEPS = 10  # of the table
MIB = 1 << 20


@contextmanager
def served(shards: Sequence[Path]) -> Iterator[tuple[list[str], Store]]:
    """Their URLs, and an empty cache."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "http.server", port, "--bind", "127.0.0.1", "--directory", str(shards[0].parent)]
    with Popen(command, stdout=DEVNULL, stderr=DEVNULL) as server, tempfile.TemporaryDirectory() as cache:
        room = sum(shard.stat().st_size for shard in shards) // 2
        try:
            yield [f"http://127.0.0.1:{port}/{shard.name}" for shard in shards], CachedStore(cache, room)
        finally:
            server.terminate()


@contextmanager
def local(shards: Sequence[Path]) -> Iterator[tuple[list[str], Store]]:
    yield list(map(str, shards)), LocalStore()


def batches_of(s: Set, shards: Sequence[str], store: Store) -> Iterator[dict]:
    fields, few = {"image": s.field, "label": Label()}, isinstance(store, CachedStore)
    window = {"window": s.per_shard} if few else {}
    data = ShardData(fields, shards, store=store, num_workers=WORKERS, **window)
    return iter(data.loader(Layout(s.batch), 0, 1 if few else LANES, 0, 1 << 40))


def rows(s: Set, shards: Sequence[str], store: Store, samples: int) -> Iterator[tuple[int, float, float, float]]:
    """Samples, megabytes of the larger worker's own, of this process's own, shared."""
    steps, here, others = samples // s.batch, psutil.Process(), set(psutil.Process().children())
    for step, _ in enumerate(islice(batches_of(s, shards, store), steps + 1)):
        if step and step % (steps // STEPS) == 0:
            workers = [child.memory_info() for child in here.children() if child not in others]
            own = [(memory.rss - memory.shared) / MIB for memory in (*workers, here.memory_info())]
            yield step * s.batch, max(own[:-1]), own[-1], max(worker.shared for worker in workers) / MIB


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SETS), help=", ".join(SETS))
    parser.add_argument("--data", type=Path, help="folder that keeps the sets")
    parser.add_argument("--remote", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        for s in (SETS[name] for name in options.only):
            folder = (options.data or Path(temporary)) / s.name
            folder.mkdir(parents=True, exist_ok=True)
            make(s, folder)
            shards = sorted((folder / "tar").glob("*.tar"))
            print(f"{s.name}\n| samples | a worker's own | this process's own | shared |\n|---|---|---|---|")
            with served(shards) if options.remote else local(shards) as (urls, store):
                for samples, worker, parent, shared in rows(s, urls, store, options.samples):
                    print(f"| {samples:,} | {worker:.1f} | {parent:.1f} | {shared:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
