"""Ranks that start within a second: forked from one process that has imported everything, and done nothing else.

Processes of their own, as `diffusion-trainer train` has them, without the seconds of imports and without its checks.
"""

import multiprocessing
import os
import socket
import sys
from contextlib import chdir
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest.mock import patch

from conftest import ROOT

from diffusion_trainer.apps import initial, train
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.callbacks import attempts
from diffusion_trainer.callbacks.last_words import attempt_folder

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["forked_runs", "spies", "interrupts", "deepspeed", "diffusion_trainer.apps.rank"]
)  # by PYTHONPATH
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline",
}  # fmt: skip
WAIT_SECONDS = 400


def train_here(where: Path, *overrides: str) -> Path:
    """The run's folder, after `diffusion-trainer train <overrides>` in the folder `where`."""
    with chdir(where):
        config = train.check(overrides)
        folder = Path(config["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config)
        initial.write(folder, config["init_from"])
        codes = run_ranks(folder, train.processes_of(config, None)[0])
    logs = where / folder / "logs"
    newest = attempt_folder(logs, max(attempts.numbers(logs), default=0))
    said = [log.read_text() for log in sorted(newest.glob("rank-*.log"))]
    assert set(codes) == {0}, "\n".join([str(codes), *said])  # None: it has not ended
    return where / folder


def run_ranks(folder: Path, count: int, **env: str) -> list[int]:
    """Each rank's exit code, of a run whose configuration is in the folder: minus the signal's number if one killed
    it, None if it had to be killed here.
    """
    with patch.dict(os.environ, ENVIRONMENT):
        ensure_running()
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
