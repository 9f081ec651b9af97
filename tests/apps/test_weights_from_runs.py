"""Weights and statistics that one run takes from another: by name, refused by name, and kept when the other goes."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from conftest import SMALL, command, finish
from options import built
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps import initial, statistics
from diffusion_trainer.apps.finished import loaded
from diffusion_trainer.apps.initial import FILE, checkpoint_in, run_of
from diffusion_trainer.apps.parts import Parts, TrainConfig
from diffusion_trainer.apps.weak import CheckpointModel
from diffusion_trainer.conventions import UserError
from diffusion_trainer.process import analytic
from diffusion_trainer.process.levels import levels
from diffusion_trainer.sampling.guidance import AutoGuidance
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint, latest, save
from diffusion_trainer.training.ema import KEY, attach_ema
from diffusion_trainer.training.sharding import Replicated

CPU = torch.device("cpu")
COSINE = built("schedule")["cosine"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


def config_of(shards, *overrides):
    return configuration.load("train", [*shards, *tiny.NETWORK, *overrides], TrainConfig)


def model_of(config, seed=0):
    return Parts.of(config, seed).model(torch.float32)


def write_run(folder, config, seed=1, ema=True, images=32):
    """A run of one step, with a checkpoint of all that it trains: weights, and another set as their average."""
    model = model_of(config, seed)
    initial.write(folder, config["init_from"]) if config["init_from"] else None
    initial.apply(model, initial.read(folder), config["init_from"])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    if ema:
        attach_ema(optimizer, lambda: 0.5)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    folders.write_config(folder, config)
    return model, save(folder / "checkpoints", images, Replicated(model, optimizer), {}, Agreement(), 5)


def averages(folder):
    return Checkpoint(latest(folder / "checkpoints")).whole(KEY)


def test_a_path_means_a_checkpoint_or_the_newest_of_a_run(here, shards):
    config = config_of(shards)
    _, first = write_run(here / "runs" / "a", config, images=32)
    _, second = write_run(here / "runs" / "a", config, images=64)
    assert checkpoint_in(here / "runs" / "a") == second
    assert checkpoint_in(first) == first
    assert run_of(first) == run_of(second)
    assert str(run_of(first)) == "runs/a"
    with pytest.raises(UserError, match=r"init_from=.*nothing: there is no checkpoint"):
        checkpoint_in(here / "runs" / "nothing", "init_from")


def test_fine_tuning_starts_from_the_average_of_the_other_run_by_name(here, shards):
    source = here / "runs" / "source"
    other, _ = write_run(source, config_of(shards))
    initial.write(make(here / "runs" / "new"), "runs/source")
    model = model_of(config_of(shards), seed=9)
    initial.apply(model, initial.read(here / "runs" / "new"), "runs/source")
    average = averages(source)
    assert set(average) == set(dict(model.named_parameters()))
    for name, p in model.named_parameters():
        assert torch.equal(p, average[name])
        assert not torch.equal(p, dict(other.named_parameters())[name])  # those are the raw ones
        assert p.requires_grad


def make(folder):
    folder.mkdir(parents=True)
    return folder


def test_without_an_average_the_weights_themselves_are_taken(here, shards):
    write_run(here / "runs" / "source", config_of(shards), ema=False)
    given = initial.of("runs/source")
    known = Checkpoint(latest(here / "runs" / "source" / "checkpoints")).whole(WEIGHT)
    assert given.keys() == known.keys()
    assert all(torch.equal(given[name], known[name]) for name in known)


def test_second_stage_takes_the_trunk_freezes_it_and_leaves_the_head_fresh(here, shards):
    write_run(here / "runs" / "source", config_of(shards))
    config = config_of(shards, "objective=npr", "init_from=runs/source")
    fresh, model = dict(model_of(config, 4).named_parameters()), model_of(config, 4)
    initial.check(model_on_meta(config), config, here / "runs" / "head")
    initial.write(make(here / "runs" / "head"), "runs/source")
    initial.apply(model, initial.read(here / "runs" / "head"), "runs/source")
    average, heads = averages(here / "runs" / "source"), 0
    for name, p in model.named_parameters():
        if name.startswith("network.second_head."):
            heads += 1
            assert torch.equal(p, fresh[name])
            assert p.requires_grad
        else:
            assert torch.equal(p, average[name])
            assert not p.requires_grad
    assert heads > 4


def model_on_meta(config):
    return Parts.of(config, device="meta").model(torch.float32)


def test_weights_are_written_once_so_that_the_source_may_go(here, shards):
    write_run(here / "runs" / "source", config_of(shards), seed=1)
    run = make(here / "runs" / "new")
    initial.write(run, None)
    assert not (run / FILE).exists()
    assert initial.read(run) == {}
    initial.write(run, "runs/source")
    before = initial.read(run)
    write_run(here / "runs" / "source", config_of(shards), seed=2, images=64)  # it trains on
    initial.write(run, "runs/source")
    shutil.rmtree(here / "runs" / "source")
    initial.write(run, "runs/source")
    again = initial.read(run)
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name], again[name]) for name in before)
    assert [p.name for p in run.iterdir()] == [FILE]
    config = config_of(shards, "objective=npr", "init_from=runs/source")
    initial.check(model_on_meta(config), config, run)
    with pytest.raises(UserError, match=r"init_from=runs/source: there is no checkpoint"):
        initial.check(model_on_meta(config), config, here / "runs" / "other")


def test_a_stage_after_the_second_has_all_that_both_have_trained(here, shards):
    source, head = here / "runs" / "source", here / "runs" / "head"
    write_run(source, config_of(shards))
    trunk = averages(source)
    config = config_of(shards, "objective=npr", "init_from=runs/source")
    make(head)
    write_run(head, config, seed=3)
    assert set(averages(head)) == {n for n, p in model_on_meta(config).named_parameters() if p.requires_grad}
    shutil.rmtree(source)
    third = initial.of("runs/head")
    assert third.keys() == dict(model_on_meta(config).named_parameters()).keys()
    for name in third:
        assert torch.equal(third[name], averages(head)[name] if "second_head" in name else trunk[name])


def test_a_finished_second_stage_is_loaded_whole(here, shards):
    write_run(here / "runs" / "source", config_of(shards))
    trunk = averages(here / "runs" / "source")
    config = config_of(shards, "objective=sn", "init_from=runs/source")
    _, folder = write_run(make(here / "runs" / "head"), config, seed=3)
    shutil.rmtree(here / "runs" / "source")
    _, model = loaded(config, Checkpoint(folder), "ema", CPU)
    heads = averages(here / "runs" / "head")
    for name, p in model.named_parameters():
        assert torch.equal(p, heads[name] if "second_head" in name else trunk[name])


@pytest.mark.parametrize("source", ["hybrid", "uncertainty"])
@pytest.mark.parametrize("then", ["simple", "npr"])
def test_what_a_source_has_and_the_run_has_not_is_left_out(here, shards, source, then):
    """A hybrid's second head, or a learned uncertainty: the run that follows trains, and is loaded, without it."""
    write_run(here / "runs" / "source", config_of(shards, f"objective={source}"))
    config = config_of(shards, f"objective={then}", "init_from=runs/source")
    initial.check(model_on_meta(config), config, here / "runs" / "new")
    trained, folder = write_run(make(here / "runs" / "new"), config, seed=3)
    _, model = loaded(config, Checkpoint(folder), "raw", CPU)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trained.parameters(), strict=True))


def test_another_shape_is_refused_by_name_with_both(here, shards):
    write_run(here / "runs" / "source", config_of(shards))
    for change in ("network.base_channels=32", "conditioning.dim=24"):
        config = config_of(shards, change, "init_from=runs/source")
        with pytest.raises(UserError, match=r"init_from=runs/source: \S+ is \(.*\) there and \(.*\) here; use"):
            initial.check(model_on_meta(config), config, here / "runs" / "new")


def test_a_frozen_weight_without_a_source_is_refused_with_advice(here, shards):
    config = config_of(shards, "objective=npr")
    with pytest.raises(UserError, match=r"not trained by this objective and has no weights; say init_from=runs/<name>"):
        initial.check(model_on_meta(config), config, here / "runs" / "new")
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with pytest.raises(UserError, match=r"bias is not trained by .* has no weights in init_from=runs/other"):
        initial.apply(model, {"weight": torch.zeros(2, 2)}, "runs/other")


def table(about):
    log_snr = torch.linspace(-8, 8, 5, dtype=torch.float64)
    return analytic.Statistics(log_snr, torch.rand(5, 1, 8, 8, dtype=torch.float64), about)


@pytest.fixture
def checkpoint(here):
    """A folder with a manifest: all that statistics look at."""
    folder = here / "runs" / "a" / "checkpoints" / "images-000000000032"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"images_seen": 32}')
    return folder


def test_statistics_are_written_whole_and_read_back(checkpoint):
    path = statistics.path_of(checkpoint, "ema")
    assert str(path) == "runs/a/variances/images-000000000032-ema.safetensors"
    known = table(statistics.about(checkpoint, "ema") | {"num_samples": 7})
    statistics.write(path, known)
    given = analytic.read(str(path))
    assert torch.equal(given.log_snr, known.log_snr)
    assert torch.equal(given.error, known.error)
    assert given.about == known.about
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_statistics_that_are_not_named_are_the_checkpoints_own_wherever_they_stand(checkpoint):
    own = str(statistics.path_of(checkpoint, "raw"))

    def node_with(value):
        listed = [{"statistics": value}, [{"deep": {"statistics": value}}], "statistics", 1.5]
        return {"variance": {"_target_": "x", "statistics": value}, "n": 3, "other": None, "list": listed}

    node = node_with(None)
    assert statistics.resolve(node, checkpoint, "raw") == node_with(own)
    assert node["variance"]["statistics"] is None  # the configuration that was given is as it was


def test_statistics_of_this_model_are_taken_and_those_of_another_refused(checkpoint, here):
    path = here / "measured.safetensors"
    ours = statistics.about(checkpoint, "ema")
    node = {"sampler": {"grid": {"statistics": str(path)}}}
    assert statistics.resolve(node, checkpoint, "ema") == node  # missing: said when it is read
    statistics.write(path, table(ours | {"num_samples": 3}))
    assert statistics.resolve(node, checkpoint, "ema") == node
    with pytest.raises(UserError, match=r"checkpoint images-000000000032 \(ema weights\), not on .*\(raw weights\).*"
                                        r"variance checkpoint=\S+ weights=raw`"):  # fmt: skip
        statistics.resolve(node, checkpoint, "raw")
    other = here / "other.safetensors"
    statistics.write(other, table(ours | {"manifest": "0" * 64, "checkpoint": "images-9"}))
    with pytest.raises(UserError, match=r"measured on checkpoint images-9 \(ema weights\), not on"):
        statistics.resolve([{"statistics": str(other)}], checkpoint, "ema")
    (checkpoint / "manifest.json").write_text('{"images_seen": 32, "again": 1}')  # trained anew in the same folder
    with pytest.raises(UserError, match="were measured on"):
        statistics.resolve(node, checkpoint, "ema")


def test_a_file_that_is_none_is_refused_by_name(checkpoint, here):
    (here / "garbage.safetensors").write_bytes(b"garbage")
    save_file({"x": torch.zeros(1)}, here / "others.safetensors")
    for name in ("garbage", "others"):
        with pytest.raises(UserError, match=rf"{name}\.safetensors cannot be read"):
            statistics.resolve({"statistics": f"{name}.safetensors"}, checkpoint, "ema")


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


def test_weak_models_that_are_not_there_are_refused(here, shards):
    with pytest.raises(UserError, match=r"guidance\.weak\.checkpoint=runs/none: there is no checkpoint"):
        CheckpointModel("runs/none").denoiser(CPU)
    write_run(here / "runs" / "a", config_of(shards), ema=False)
    with pytest.raises(UserError, match="has no ema weights"):
        CheckpointModel("runs/a").denoiser(CPU)


SLOW = [o for o in SMALL if not o.startswith("evaluation.")] + ["evaluation=none", "strategy=single"]
HEAD = ["train", "experiment=digits", *SLOW, "objective=npr", "name=head", "init_from=runs/source"]


@pytest.mark.slow
def test_a_second_stage_goes_on_bitwise_after_its_source_is_gone(trained, workplace):
    """Real runs: 48 images at once, and 32 and then 16 with the source deleted between; the heads are the same bits."""
    source, runs = trained / "runs" / "digits", workplace / "runs"
    shutil.copytree(source, runs / "source")
    code, output = finish(command(*HEAD, "folder=runs/whole", "num_images=48", cwd=workplace))
    assert code == 0, output
    code, output = finish(command(*HEAD, "folder=runs/parts", "num_images=32", cwd=workplace))
    assert code == 0, output
    shutil.rmtree(runs / "source")
    code, output = finish(command(*HEAD, "folder=runs/parts", "num_images=48", cwd=workplace))
    assert code == 0, output
    assert "resuming from images-000000000032" in output
    whole, parts = (Checkpoint(latest(runs / name / "checkpoints")) for name in ("whole", "parts"))
    assert whole.images_seen == parts.images_seen == 48
    assert all(name.startswith("network.second_head.") for name in whole.shapes)
    for kind in (WEIGHT, KEY, "exp_avg", "exp_avg_sq"):
        ours, theirs = whole.whole(kind), parts.whole(kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    moved = whole.whole(WEIGHT)["network.second_head.conv.weight"]
    assert moved.any()
    code, output = finish(
        command("sample", "checkpoint=runs/parts", "sampler=ancestral", "sampler.num_steps=3", "n=2", cwd=workplace)
    )
    assert code == 0, output


@pytest.mark.slow
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
