"""diffusion-trainer wandb-sync: a run that was offline, or whose server was away, sent to Weights & Biases later."""

import os
from collections.abc import Sequence
from pathlib import Path

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps import folder_lock
from diffusion_trainer.apps.nodes import Schema, build
from diffusion_trainer.callbacks.loggers import Wandb, logged_in, server
from diffusion_trainer.callbacks.wandb_session import alone
from diffusion_trainer.conventions import UserError


class SyncConfig(Schema):
    run: str


def show(overrides: Sequence[str]) -> str:
    return configuration.dump(_load(overrides))


def _load(overrides: Sequence[str]) -> dict:
    return configuration.load("wandb-sync", overrides, SyncConfig)


def main(overrides: Sequence[str]) -> int:
    named = _load(overrides)["run"]
    if named == "???":
        raise UserError("run is missing: say run=runs/<name>, the folder of a run")
    folder = Path(named)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run={folder} is no run's folder: there is no config.yaml in it")
    run = configuration.read(folder / "config.yaml")
    built = [build(node, f"logger.{name}", ()) for name, node in run["logger"].items() if node is not None]
    loggers = [logger for logger in built if isinstance(logger, Wandb)]
    if not loggers or not (folder / "run_id").is_file():
        raise UserError(f"{folder} holds no run of Weights & Biases: its logger is {', '.join(run['logger'])}")
    os.environ["WANDB_MODE"] = "online"  # with another one in the shell nobody would be logged in
    if not logged_in():
        raise UserError(f"nobody is logged in at {server()}: wandb login, or set WANDB_API_KEY")
    with alone(folder, 0):  # not the run's own lock: a job that comes out of the queue starts, and waits for us a while
        if folder_lock.is_locked(folder / folder_lock.LOCK):
            raise UserError(
                f"{folder} is training: online it sends by itself what is missing; offline it is sent once it has ended"
            )
        rows = loggers[0].send(folder, run["name"], folders.run_id(folder), run)
    print(f"{folder}: {rows:,} rows sent to {server()}, which had all others")
    return 0
