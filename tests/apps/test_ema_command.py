"""`diffusion-trainer ema`: a length that no average had is near to what it would have been, and can be drawn from."""

import pytest
import tiny
import torch
from safetensors.torch import load_file

from diffusion_trainer.apps import cli, rank, train
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.checkpoints import Checkpoint, latest

pytestmark = pytest.mark.slow

SNAPSHOTS = [
    "+callbacks.ema_snapshots._target_=diffusion_trainer.callbacks.ema_snapshots.EmaSnapshots",
    "+callbacks.ema_snapshots.every_n_images=128",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 60 steps that also kept the average that is to be made."""
    folder = tmp_path_factory.mktemp("ema")
    config = load("train", [
        *tiny.overrides(folder), *tiny.NETWORK, "trainer.accelerator=cpu", f"folder='{folder}/run'", "strategy=single",
        "num_images=1920", "callbacks.evaluate=null", "optimizer.lr_schedule.warmup_images=0", "optimizer.lr=0.01",
        "sampler.num_steps=3", "ema=several", *SNAPSHOTS,
        "+ema.profiles.truth={_target_: diffusion_trainer.training.ema.PowerFunction, relative_std: 0.15}",
    ], TrainConfig)  # fmt: skip
    (folder / "run").mkdir()
    write_config(folder / "run", config)
    assert rank.work(config, folder / "run", World(0, 1, 1, False)) == 0
    return folder / "run"


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_it_is_near_to_the_average_that_was_kept(run, capsys):
    """From the snapshots of all three it is that one; from the other two (their file taken away) nearly so."""
    checkpoint = Checkpoint(latest(run / "checkpoints"))
    truth, near = (flat(checkpoint.whole(kind)) for kind in ("ema.truth", "ema"))
    assert cli.run(["ema", f"checkpoint={run}", "relative_std=0.15"]) == 0
    path = run / "exports" / "images-000000001920-ema-0.15-fp32.safetensors"
    assert str(path) in capsys.readouterr().out
    assert (flat(load_file(path)) - truth).norm() < 1e-3 * (near - truth).norm()
    assert cli.run(["ema", f"checkpoint={run}", "relative_std=0.13", f"out={run}/a.safetensors"]) == 0
    made = flat(load_file(run / "a.safetensors"))
    assert (made - truth).norm() < (near - truth).norm()
    assert (made - near).norm() < (near - truth).norm()


def test_it_can_be_drawn_from(run, capsys):
    assert cli.run(["ema", f"checkpoint={run}", "relative_std=0.2", f"out={run}/b.safetensors"]) == 0
    drawn = ["sample", f"checkpoint={run}", f"weights={run}/b.safetensors", "n=4", f"out={run}/drawn"]
    assert cli.run(drawn) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["relative_std=0.4"], r"relative_std must lie in \(0, 0.2887\)"),
        (["relative_std=0.1", "images_seen=130"], "images_seen=130 is none of the 15 snapshots; the nearest is 128"),
        (["relative_std=0.1", "out=x.pt"], "must end in .safetensors"),
    ],
)
def test_what_cannot_be_made(run, overrides, message):
    with pytest.raises(UserError, match=message):
        cli.run(["ema", f"checkpoint={run}", *overrides])


def test_snapshots_need_an_average_that_is_a_power_function(tmp_path):
    with pytest.raises(UserError, match="train with ema=several or ema=power"):
        train.check([*tiny.overrides(tmp_path), *SNAPSHOTS, f"folder='{tmp_path}/run'"])


def test_files_that_do_not_fit_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        cli.run(["sample", f"checkpoint={run}", f"weights={tmp_path}/none.safetensors", "n=1"])
    rank_file = latest(run / "checkpoints") / "rank-00000.safetensors"
    with pytest.raises(UserError, match="is of run None, the checkpoint of digits; use a file of its own"):
        cli.run(["sample", f"checkpoint={run}", f"weights={rank_file}", "n=1"])
