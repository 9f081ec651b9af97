"""Sweeps of real runs: killed and continued, searched, pruned, seen in Weights & Biases."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import SMALL, command, finish

from diffusion_trainer.callbacks.wandb_files import identity

pytestmark = pytest.mark.slow
TRAIN = ["train", "-m", "experiment=digits", *SMALL, "strategy=single", "num_images=320",
         "callbacks.evaluate.every_n_images=80", "callbacks.checkpoint.every_n_images=80"]  # fmt: skip
TIMES = {"train/images_per_second", "train/save_seconds"}


def metrics(folder: Path, lr: str) -> list[dict]:
    """All that a point has logged, but for times."""
    with (folder / f"optimizer.lr-{lr}" / "metrics.csv").open(newline="") as file:
        found = [{k: v for k, v in row.items() if k not in TIMES and v} for row in csv.DictReader(file)]
    return [row for row in found if len(row) > 1]


def rows(folder: Path) -> list[dict]:
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.timeout(1800)
def test_a_sweep_of_four_points_with_one_that_fails_is_killed_and_continued(workplace, cli):
    """The point that was killed against the same run, left alone."""
    arguments = [*(o for o in TRAIN if o != "logger=csv"), "name=killed", "optimizer.lr=0.001,0.002,0.004,0.008"]
    runs = workplace / "runs"
    blocked = runs / "killed" / "optimizer.lr-0.002" / "logs"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder has to be")

    sweep = command(*arguments, cwd=workplace)
    until((runs / "killed" / "optimizer.lr-0.004" / "checkpoints" / "latest").is_file)
    os.kill(sweep.pid, signal.SIGKILL)
    finish(sweep)
    assert states(runs / "killed") == ["done", "failed", "running", "not started"]
    code, output = cli(*arguments)
    assert code == 2, output
    assert "[1/4] optimizer.lr=0.001 is done already" in output
    assert "resuming from images-" in output
    assert "3 of 4 points are done" in output
    assert "[2/4] optimizer.lr=0.002 failed" in output
    found = rows(runs / "killed")
    assert [row["state"] for row in found] == ["done", "failed", "done", "done"]
    assert [bool(row["fid"]) for row in found] == [True, False, True, True]

    code, output = cli("train", *TRAIN[2:], "name=alone", "folder=runs/alone/optimizer.lr-0.004", "optimizer.lr=0.004")
    assert code == 0, output
    assert metrics(runs / "killed", "0.004") == metrics(runs / "alone", "0.004")
    alone = json.loads((runs / "alone" / "optimizer.lr-0.004" / "metrics.json").read_text())["metrics"]
    assert {name: found[2][name] for name in alone} == {name: str(value) for name, value in alone.items()}

    blocked.unlink()
    code, output = cli(*arguments)
    assert code == 0, output
    told = identity(runs / "killed" / "optimizer.lr-0.002")
    assert told == {"group": "killed"}, output + wandb_core_said(runs / "killed")
    code, output = cli("sweep-report", "sweep=runs/killed", "sort=fid")
    assert code == 0
    assert "4 done" in output
    fids = {float(row["fid"]): row["optimizer.lr"] for row in rows(runs / "killed")}
    assert list(fids) == sorted(fids)
    assert f"with optimizer.lr={fids[min(fids)]}" in output


def wandb_core_said(sweep: Path) -> str:
    return "\n".join(f"{path}\n{path.read_text()}" for path in sweep.glob("*/wandb/*/logs/debug-*.log"))


def until(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def states(folder: Path) -> list[str]:
    return [entry["state"] for entry in json.loads((folder / "sweep.json").read_text())["points"]]


@pytest.mark.timeout(1800)
def test_a_search_stops_what_is_worse_and_the_same_command_has_nothing_left_to_do(workplace, cli):
    """Guided by 100 all pixels are black or white. Each point has two processes."""
    arguments = [*TRAIN, "strategy=zero2", "sweeper=random", "sweeper.seed=14", "trials=3", "guidance.scale=1,2,100",
                 "prune=true", "sweeper.prune_startup_trials=1", "callbacks.evaluate.at_start=false"]  # fmt: skip
    code, output = cli(*arguments, "name=searched")
    assert code == 0, output
    found = rows(workplace / "runs" / "searched")
    states = {row["guidance.scale"]: row["state"] for row in found}
    assert (states["2"], states["100"], len(states)) == ("done", "pruned", 3)  # 1 comes last, and may be a little worse
    pruned = list(states.values()).count("pruned")
    assert output.count("is worse than others at the same images; it is stopped") == pruned
    done = [float(row["fid"]) for row in found if row["state"] == "done"]
    assert f"best fid: {min(done):.4g}" in output
    code, output = cli(*arguments, "name=searched")
    assert code == 0, output
    assert rows(workplace / "runs" / "searched") == found
    assert "run searched" not in output
