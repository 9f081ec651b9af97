"""Data of real numbers, as an autoencoder's latents: not clipped like pixels, and drawn as they are."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from streaming.members import npy

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps import rank
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.apps.train import preflight
from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.writer import write_shards

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """overrides of a run on latents of deviation 1: a third of them are beyond [-1, 1]"""
    folder, noise = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    arrays = noise.standard_normal((64, 4, 8, 8)).astype(np.float16)
    write_shards(({"__key__": f"{i:04d}", "latent.npy": npy(a)} for i, a in enumerate(arrays)), folder, "train", 40)
    return [
        "data=latents", f"data.shards='{folder}/train-*.tar'", "data.fields.image.height=8", "data.fields.label=null",
        "data.fields.image.width=8", "conditioning=none", "strategy=single", "logger=csv", "evaluation=none",
        "data.num_workers=0", "batch_size=32", "lanes=4", "num_images=32", *tiny.NETWORK, "trainer.accelerator=cpu",
        "network.channel_multipliers=[1,1]", "network.attention_levels=[]", "callbacks.log=null", "sampler.num_steps=4",
    ]  # fmt: skip


def test_they_are_drawn_as_real_numbers(latents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load("train", [*latents, "folder=run", "sampler.x_0_bound=null"], TrainConfig)
    preflight(config, 1, Path("run"))
    Path("run").mkdir()
    write_config(Path("run"), config)
    assert rank.work(config, Path("run"), World(0, 1, 1, False)) == 0
    assert console.run(["sample", "checkpoint=run", "n=3", "out=drawn", "accelerator=cpu"]) == 0
    drawn = np.load("drawn.npz")["latents"]
    assert (drawn.shape, drawn.dtype) == ((3, 4, 8, 8), np.float32)
    assert np.abs(drawn).max() > 1
    with pytest.raises(UserError, match=r"sampler\.x_0_bound=1\.0 would clip estimates.*sampler\.x_0_bound=null"):
        console.run(["sample", "checkpoint=run", "sampler=ddim", "out=clipped", "accelerator=cpu"])


@pytest.mark.parametrize(
    ("overrides", "say"),
    [
        ([], "sampler.x_0_bound=1.0 would clip estimates to [-1.0, 1.0], as of pixels, but the data are latents"),
        (["sampler.x_0_bound=null", "objective=hybrid"], "objective=hybrid has the likelihood of 8-bit pixels"),
    ],
)
def test_what_takes_them_for_pixels_is_refused(latents, overrides, say):
    with pytest.raises(UserError) as error:
        preflight(load("train", [*latents, *overrides], TrainConfig), 1, Path("none"))
    assert say in str(error.value)
