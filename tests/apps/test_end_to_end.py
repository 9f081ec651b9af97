"""The product as its user meets it: whole runs through the console command."""

import csv
import json
import signal
import threading
import time

import numpy as np
import pytest
import yaml
from conftest import ROOT, SMALL, command, finish
from PIL import Image

from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.slow
RUN = ["train", "experiment=digits", *SMALL]


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for(path, text, seconds=120):
    """Until a file has a line with the text."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.is_file() and text in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never said {text}")


def test_a_minute_of_digits_improves_fid_fivefold_and_leaves_what_it_promises(cli, workplace):
    code, output = cli(
        "train", "experiment=digits", "num_images=25600", "evaluation.num_samples=600", "sampler.num_steps=15",
        "callbacks.evaluate.every_n_images=12800",
    )  # fmt: skip
    assert code == 0, output
    run = workplace / "runs" / "digits"
    report = json.loads((run / "metrics.json").read_text())
    first, *_, last = report["history"]
    assert first["images_seen"] == 0
    assert last["images_seen"] == 25600
    assert last["weights"] == "ema"
    assert last["fid"] * 5 < first["fid"]
    assert last["accuracy"] > 0.8
    assert report["metrics"]["fid"] == last["fid"]
    assert yaml.safe_load((run / "config.yaml").read_text())["num_images"] == 25600
    assert Image.open(run / "samples.png").size == (10 * 33 - 1, 8 * 33 - 1)
    assert len(list((run / "samples").glob("*.png"))) == 3
    assert latest(run / "checkpoints").name == "images-000000025600"
    (offline,) = (run / "wandb").glob("offline-run-*")
    record = next(offline.glob("run-*.wandb")).read_bytes()
    for key in (b"eval/fid", b"train/loss", b"train/images_per_second", b"train/learning_rate", b"images_seen"):
        assert key in record, key
    assert len(list((offline / "files" / "media" / "images" / "eval").glob("samples*.png"))) == 3
    assert [float(r["train/loss"]) for r in rows(run) if r["train/loss"]][-1] < 0.2
    summary = output[output.index("done: ") :]
    for promised in ("samples.png", "checkpoint ", "metrics.json", "config.yaml", "try next", "recognised"):
        assert promised in summary
    assert len(summary.strip().splitlines()) == 10

    code, output = cli(
        "sample", "checkpoint=runs/digits", "sampler=ddim", "sampler.num_steps=20", "guidance.scale=2", "label=7",
        "n=64",
    )  # fmt: skip
    assert code == 0, output
    drawn = np.load(run / "drawn" / "label-7-seed-0.npz")
    assert drawn["images"].shape == (64, 1, 8, 8)
    assert drawn["label"].tolist() == [7] * 64
    provenance = json.loads(str(drawn["provenance"]))
    assert provenance["sampler"]["num_steps"] == 20
    assert provenance["guidance"]["scale"] == 2
    assert (run / "drawn" / "label-7-seed-0.png").is_file()

    code, output = cli("evaluate", "checkpoint=runs/digits")
    assert code == 0, output
    evaluated = json.loads((run / "evaluations" / "images-000000025600.json").read_text())
    # One process draws what two drew while training, from the weights that they had.
    assert evaluated["metrics"] == pytest.approx(report["metrics"], rel=1e-3)
    assert evaluated["provenance"]["reference"] == report["provenance"]["reference"]


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_these_train_and_evaluate_too(cli, workplace, strategy):
    code, output = cli(*RUN, f"strategy={strategy}", "num_images=64", "callbacks.evaluate.every_n_images=32")
    assert code == 0, output
    history = json.loads((workplace / "runs" / "digits" / "metrics.json").read_text())["history"]
    assert [h["images_seen"] for h in history] == [0, 32, 64]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_where_it_was(workplace, number):
    """Ctrl-C: a resumable checkpoint, exit code 128 + signal; the same command ends the run, one curve, one W&B id."""
    run = workplace / "runs" / "digits"
    arguments = [o for o in RUN if o != "logger=csv"] + ["num_images=1920", "callbacks.evaluate=null"]
    process = command(*arguments, cwd=workplace)
    wait_for(run / "metrics.csv", "\n160,")
    process.send_signal(number)
    code, output = finish(process)
    assert code == 128 + number, output
    stopped = Checkpoint(latest(run / "checkpoints")).images_seen
    assert 160 <= stopped < 1920
    assert f"stopped at {stopped:,} images; run the same command again" in output
    assert "Traceback" not in output

    code, output = finish(command(*arguments, cwd=workplace))
    assert code == 0, output
    assert f"resuming from images-{stopped:012d}" in output
    assert Checkpoint(latest(run / "checkpoints")).images_seen == 1920
    logged = [int(r["images_seen"]) for r in rows(run)]
    assert logged == list(range(16, 1921, 16))
    ids = {p.name.rsplit("-", 1)[1] for p in (run / "wandb").glob("offline-run-*")}
    assert ids == {(run / "run_id").read_text()}
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2

    code, output = finish(command(*arguments, cwd=workplace))  # and once more: it is done
    assert code == 0
    assert "already at 1,920 images" in output


def test_ctrl_c_during_the_start_is_just_the_end(workplace):
    process = command(*RUN, "num_images=3200", cwd=workplace)
    wait_for(workplace / "runs" / "digits" / "config.yaml", "num_images")
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "Traceback" not in output


def test_a_killed_rank_ends_the_run_and_loses_nothing_before_the_checkpoint(workplace):
    run = workplace / "runs" / "digits"
    arguments = [*RUN, "num_images=1920", "callbacks.evaluate=null", "callbacks.checkpoint.every_n_images=160"]
    process = command(*arguments, cwd=workplace)
    wait_for(run / "checkpoints" / "latest", "images-")
    kill_rank(process.pid, 1)
    started = time.monotonic()
    code, output = finish(process)
    assert time.monotonic() - started < 30
    assert code == 1
    assert "rank " in output
    assert "run the same command again to resume" in output
    code, output = finish(command(*arguments, cwd=workplace))
    assert code == 0, output
    assert "resuming from images-" in output
    assert [int(r["images_seen"]) for r in rows(run)] == list(range(16, 1921, 16))


def kill_rank(parent: int, rank: int) -> None:
    import psutil

    for child in psutil.Process(parent).children(recursive=True):
        if child.environ().get("LOCAL_RANK") == str(rank):
            child.kill()
            return
    raise AssertionError(f"no rank {rank}")


def test_a_folder_in_use_is_refused(workplace):
    process = command(*RUN, "num_images=32000", "callbacks.evaluate=null", cwd=workplace)
    threading.Timer(200, process.kill).start()
    wait_for(workplace / "runs" / "digits" / "metrics.csv", "\n16,")
    code, output = finish(command(*RUN, "num_images=32000", "callbacks.evaluate=null", cwd=workplace))
    assert code == 2
    assert "another process is training in runs/digits" in output
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


def test_without_labels_without_evaluation(cli, workplace):
    """Unconditional, ELBO-weighted, linear schedule, ancestral sampling: every other joint of the house."""
    code, output = cli(
        *[o for o in RUN if not o.startswith("evaluation.")], "evaluation=none", "conditioning=none",
        "guidance=none", "data.fields.label=null", "objective=elbo", "schedule=linear", "sampler=ancestral",
        "sampler.num_steps=5", "strategy=single", "timesteps=uniform", "ema=constant", "optimizer=adamw",
        "num_images=64",
    )  # fmt: skip
    assert code == 0, output
    code, output = cli("sample", "checkpoint=runs/digits", "n=5", "guidance=classifier_free", "guidance.scale=3")
    assert code == 2
    assert "nothing to guide it to: use guidance=none" in output
    code, output = cli("sample", "checkpoint=runs/digits", "n=5", "weights=raw")
    assert code == 0, output
    assert "label" not in np.load(workplace / "runs" / "digits" / "drawn" / "label-all-seed-0.npz")


def test_torchrun_starts_the_ranks_as_well(workplace):
    import os
    import subprocess
    import sys

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "diffusion_trainer",
         *RUN, "num_images=64", "callbacks.evaluate=null"],
        cwd=workplace, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert latest(workplace / "runs" / "digits" / "checkpoints").name == "images-000000000064"
