"""conditioning=embedding from shards to samples: trained, evaluated, drawn; each sample by the condition of its own."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import captioned
import numpy as np
import pytest
import torch
from options import built

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps import rank
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.apps.train import preflight
from diffusion_trainer.conditioning.embedding import Embedding
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.evaluation import Evaluation
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.guidance import NoGuidance
from diffusion_trainer.training.agreement import Agreement

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("captioned")
    captioned.write(made)
    return made


def config_of(folder, *more):
    return load("train", [*captioned.overrides(folder), *more], TrainConfig)


def train(config, run):
    preflight(config, 1, run)
    run.mkdir(parents=True)
    write_config(run, config)
    assert rank.work(config, run, World(0, 1, 1, False)) == 0


# ---- the whole way ---------------------------------------------------------------------------------------------------


def test_a_run_trains_evaluates_and_draws_by_embeddings(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = config_of(
        folder, "num_images=96", "condition_dropout=0.5", "guidance.scale=2", "callbacks.log=null", "folder=run",
        "optimizer.lr=0.02", "optimizer.lr_schedule.warmup_images=1",
    )  # fmt: skip
    train(config, tmp_path / "run")
    report = json.loads(Path("run/metrics.json").read_text())
    assert report["images_seen"] == 96
    assert {"fid", "accuracy"} <= set(report["metrics"])
    assert Path("run/samples.png").is_file()

    drawn = {}
    for scale in (0, 1, 3):
        out = f"scale-{scale}"
        arguments = ["n=12", f"guidance.scale={scale}", "weights=raw", f"out={out}", "accelerator=cpu"]
        assert console.run(["sample", "checkpoint=run", *arguments]) == 0
        drawn[scale] = np.load(f"{out}.npz")
    conditions = drawn[1]["embedding"]  # as the network is told them: ten classes' in turn, and the first two again
    assert conditions.shape == (12, captioned.WIDTH)
    assert (conditions[:2] == conditions[10:]).all()
    assert "label" not in drawn[1]
    np.save("others.npy", captioned.CODES[[4]])
    assert console.run(["sample", "checkpoint=run", "conditioning.examples=others.npy", "n=3", "out=others"]) == 0
    assert np.load("others.npz")["embedding"] == pytest.approx(conditions[[4, 4, 4]])
    assert (drawn[0]["images"] != drawn[1]["images"]).any()
    assert (drawn[3]["images"] != drawn[1]["images"]).any()

    assert console.run(["evaluate", "checkpoint=run", "accelerator=cpu", "out=evaluated.json"]) == 0
    evaluated = json.loads(Path("evaluated.json").read_text())["metrics"]
    assert evaluated == pytest.approx(report["metrics"], rel=1e-3)
    with pytest.raises(UserError, match="label=3: this model has no labels"):
        console.run(["sample", "checkpoint=run", "label=3"])
    for mode in ("interpolate mode.points=2", "invert"):
        assert console.run(["sample", "checkpoint=run", "n=2", f"out={mode[:6]}", *f"mode={mode}".split()]) == 0
    capsys.readouterr()


# ---- each sample by its own condition --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Obedient(Denoiser):
    """x_0_hat is an image of the class whose code the condition is: to be told another is to be seen."""

    codes: torch.Tensor
    images: torch.Tensor

    def __call__(self, x_t, level, condition):
        return Estimate(self.images[(condition @ self.codes.T).argmax(1)].to(x_t))

    def null(self, condition):
        return torch.zeros_like(condition)


@dataclass
class Ranks:
    """An Agreement of `world` ranks that run one after the other; the last one gathers what all have."""

    rank: int
    world: int
    shares: list

    def gather(self, value):
        self.shares.append(value)
        return self.shares if len(self.shares) == self.world else [value] * self.world

    def any(self, flag):
        return flag


def evaluation_of(folder, num_samples, conditioning):
    """The evaluation, and a generator of what each condition says."""
    config = config_of(folder, f"evaluation.num_samples={num_samples}", "evaluation.batch_size=7")
    evaluation: Evaluation = build(config["evaluation"], "evaluation")
    first = evaluation.reference.batch(range(10))  # a sample of each class, in order
    images = first["image"].float() / 127.5 - 1
    denoiser = Obedient(conditioning.read(first), images)
    sampler = replace(built("sampler")["ddim"], num_steps=2)
    schedule = built("schedule")["cosine"]
    return evaluation, Generator(denoiser, schedule, sampler, FixedSmall(), NoGuidance(), (1, 8, 8), CPU, 0)


@pytest.mark.parametrize("num_samples", ["null", 37, 130])
def test_an_evaluation_asks_each_sample_for_the_condition_of_its_reference(folder, num_samples):
    conditioning = Embedding(captioned.WIDTH, 4)
    evaluation, generator = evaluation_of(folder, num_samples, conditioning)
    prepared = evaluation.prepare(CPU, Agreement(), conditioning)
    references = conditioning.read(evaluation.reference.batch(range(100)))
    assert torch.equal(prepared.conditions(), torch.cat([references, references])[: prepared.count])
    assert prepared(generator)["accuracy"] == 1
    prepared._conditions = prepared._conditions.roll(1, 0)
    assert prepared(generator)["accuracy"] == 0


@pytest.mark.parametrize("world", [2, 3, 101])  # of 100 references: the last of 101 ranks has none
def test_the_conditions_do_not_depend_on_the_number_of_ranks(folder, world):
    conditioning = Embedding(captioned.WIDTH, 4)
    evaluation, _ = evaluation_of(folder, "null", conditioning)
    whole, shares = evaluation.prepare(CPU, Agreement(), conditioning), []
    for r in range(world):
        last = evaluation.prepare(CPU, Ranks(r, world, shares), conditioning)
    assert torch.equal(last.conditions(), whole.conditions())
    assert torch.equal(last._labels, whole._labels)
    assert last.reference_digest == whole.reference_digest


# ---- what is refused before a device is touched ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("conditioning.width=17", r"shape \(100, 3, 16\) in a batch.*conditioning.width"),
        ("conditioning.field=text", "the conditioning reads text, but data.fields.text is null; name what holds it"),
        ("data.fields.embedding=null", "the conditioning reads embedding, but data.fields.embedding is null"),
        ("++evaluation.reference.fields.embedding=null", "but evaluation.reference.fields.embedding is null"),
        ("conditioning.examples=null", r"np.save\('examples.npy'"),
        ("conditioning.examples=none.npy", "conditioning.examples=none.npy cannot be read as npy"),
        ("guidance=classifier guidance.classifier={folder}/noisy.pt", "needs labels"),
    ],
)
def test_what_cannot_train_or_draw_is_refused_at_once(folder, tmp_path, change, message):
    torch.jit.save(torch.jit.script(Noisy()), str(folder / "noisy.pt"))
    config = config_of(folder, *change.format(folder=folder).split())
    with pytest.raises(UserError, match=message):
        preflight(config, 1, tmp_path / "run")


class Noisy(torch.nn.Module):
    """(x_t, log_snr) -> logits (B, 10)."""

    def forward(self, x_t: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        return x_t.flatten(1)[:, :10] * log_snr.sigmoid()[:, None]


def test_a_run_that_draws_nothing_needs_no_examples(folder, tmp_path):
    config = config_of(folder, "conditioning.examples=null", "callbacks.evaluate=null")
    preflight(config, 1, tmp_path / "run")
