"""Checkpoints that guide other models."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from conftest import command, finish
from options import built
from torch.testing import assert_close
from written_runs import config_of, write_run

from diffusion_trainer.apps.finished import loaded
from diffusion_trainer.apps.weak import CheckpointModel
from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.levels import levels
from diffusion_trainer.sampling.guidance import AutoGuidance
from diffusion_trainer.training.checkpoints import Checkpoint

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
COSINE = built("schedule")["cosine"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 8, 8, generator=generator), levels(COSINE, [0.6])[0], torch.tensor([0, 4, 9])


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_guided_by_itself_a_model_is_itself(here, shards, weights):
    config = config_of(shards)
    _, folder = write_run(here / "runs" / "a", config)
    weak = CheckpointModel("runs/a", weights)
    parts, model = loaded(config, Checkpoint(folder), weights, CPU)
    denoiser = model.denoiser(COSINE, parts.objective.prediction)
    plain = denoiser(*inputs()).x_0_hat
    assert torch.equal(weak.denoiser(CPU)(*inputs()).x_0_hat, plain)
    for scale in (0.0, 2.0, 5.0):
        assert_close(AutoGuidance(scale, weak)(denoiser)(*inputs()).x_0_hat, plain)
    other = CheckpointModel("runs/a", "raw" if weights == "ema" else "ema")
    assert (AutoGuidance(2.0, other)(denoiser)(*inputs()).x_0_hat - plain).abs().max() > 1e-3


def test_a_weak_model_may_be_one_checkpoint_of_a_smaller_network(here, shards):
    strong, small = config_of(shards), config_of(shards, "network.base_channels=8", "network.head_channels=8")
    _, folder = write_run(here / "runs" / "strong", strong)
    _, weak_folder = write_run(here / "runs" / "small", small, images=64)
    parts, model = loaded(strong, Checkpoint(folder), "ema", CPU)
    _, weak_model = loaded(small, Checkpoint(weak_folder), "ema", CPU)
    denoiser, weak = (m.denoiser(COSINE, parts.objective.prediction) for m in (model, weak_model))
    given = AutoGuidance(3.0, CheckpointModel(str(weak_folder)))(denoiser)(*inputs()).x_0_hat
    a, b = denoiser(*inputs()).x_0_hat, weak(*inputs()).x_0_hat
    assert_close(given, a + 2 * (a - b))


@pytest.mark.parametrize("labels", [[], ["conditioning=none", "data.fields.label=null"]])
def test_a_weak_models_estimates_are_as_coarse_as_its_own_run_makes_them(here, shards, labels):
    write_run(here / "runs" / "coarse", config_of(shards, "precision=bf16", *labels))
    assert CheckpointModel("runs/coarse").denoiser(CPU).precision == torch.bfloat16


def test_weak_models_that_are_not_there_are_refused(here, shards):
    with pytest.raises(UserError, match=r"guidance\.weak\.checkpoint=runs/none: there is no checkpoint"):
        CheckpointModel("runs/none").denoiser(CPU)
    write_run(here / "runs" / "a", config_of(shards), ema=False)
    with pytest.raises(UserError, match="has no ema weights"):
        CheckpointModel("runs/a").denoiser(CPU)


def test_autoguidance_by_the_model_itself_draws_what_it_draws_alone(trained, workplace):
    shutil.copytree(trained / "runs", workplace / "runs")
    common = ["sample", "checkpoint=runs/digits", "n=4", "sampler.num_steps=3"]
    drawn = []
    for out, guidance in (
        ("alone", ["guidance=none"]),
        ("by_itself", ["guidance=autoguidance", "guidance.weak.checkpoint=runs/digits"]),
    ):
        code, output = finish(command(*common, *guidance, f"out={out}", cwd=workplace))
        assert code == 0, output
        drawn.append(np.load(workplace / f"{out}.npz")["images"].astype(int))
    assert abs(drawn[0] - drawn[1]).max() <= 1
    assert (
        json.loads(str(np.load(workplace / "by_itself.npz")["provenance"]))["guidance"]["weak"]["checkpoint"]
        == "runs/digits"
    )
