"""Ranks that start within a second: forked from one process that has imported everything, and done nothing else.

Processes of their own, as `diffusion-trainer train` has them, without the seconds of imports and without its checks.
"""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["forked_runs", "spies", "interrupts", "deepspeed", "diffusion_trainer.apps.rank"]
)  # by PYTHONPATH
WAIT_SECONDS = 400


def run_ranks(folder: Path, count: int, **env: str) -> list[int]:
    """Each rank's exit code, of a run whose configuration is in the folder; minus the signal's number if one killed it.

    The first call in a session decides what all find in their environment, but for `env`.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "NODE_RANK": "0", **env,
    }  # fmt: skip
    ranks = [FORKS.Process(target=_rank, args=(os.getcwd(), str(folder), shared, rank)) for rank in range(count)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(WAIT_SECONDS)
        return [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()  # nothing, where it has ended


def _rank(where: str, folder: str, shared: dict[str, str], rank: int) -> None:
    from diffusion_trainer.apps.rank import main

    os.chdir(where)
    os.environ |= {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = ["start", folder]
    sys.exit(main())
