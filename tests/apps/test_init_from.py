"""Weights that one run takes from another: by name, refused by name, and kept when the other goes."""

import shutil
import socket
import time

import pytest
import tiny
import torch
from conftest import SMALL, command, finish
from torch import nn
from written_runs import averages, config_of, model_of, write_run

from diffusion_trainer.apps import initial, rank
from diffusion_trainer.apps.finished import loaded
from diffusion_trainer.apps.initial import FILE, NOTE, checkpoint_in, run_of
from diffusion_trainer.apps.parts import Parts
from diffusion_trainer.conventions import UserError
from diffusion_trainer.networks.unet import ResidualBlock
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint, latest
from diffusion_trainer.training.ema import KEY

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


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
    assert sorted(p.name for p in run.iterdir()) == [NOTE, FILE]
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


def test_a_frozen_trunk_has_no_dropout_from_the_first_step_on(here, shards):
    dropout = "network.dropout=0.5"
    write_run(here / "runs" / "source", config_of(shards, dropout))
    config = config_of(shards, dropout, "objective=npr", "init_from=runs/source")
    initial.write(make(here / "runs" / "head"), "runs/source")
    module = rank.module_of(config, rank.progress_of(config), "cpu")
    network = module.model.network
    assert {m.training for m in network.second_head.modules()} == {True}
    blocks = [m for m in network.modules() if isinstance(m, ResidualBlock) and m.dropout.p]
    assert blocks
    assert not any(m.training for block in blocks for m in block.modules())
    whole = rank.module_of(config_of(shards, dropout), rank.progress_of(config), "cpu")
    assert all(m.training for m in whole.modules())


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


def test_how_many_tensors_were_taken_is_said_and_none_is_refused(here, shards):
    write_run(here / "runs" / "source", config_of(shards))
    config = config_of(shards, "init_from=runs/source")
    count = len(averages(here / "runs" / "source"))
    new = here / "runs" / "new"
    assert initial.check(model_on_meta(config), config, new).startswith(
        f"{count} of {count} tensors are those of init_"
    )
    head = config_of(shards, "objective=npr", "init_from=runs/source")
    more = len(dict(model_on_meta(head).named_parameters()))
    said = initial.check(model_on_meta(head), head, new)
    assert said.startswith(
        f"{count} of {more} tensors are those of init_from=runs/source; the others are fresh (network."
    )
    with pytest.raises(
        UserError, match=r"init_from=runs/source has none of the 2 tensors of this model \(there .*weight"
    ):
        initial.check(nn.Linear(2, 2), config, new)


SLOW = [o for o in SMALL if not o.startswith("evaluation.")] + ["evaluation=none", "strategy=single"]
HEAD = ["train", "experiment=digits", *SLOW, "objective=npr", "name=head", "init_from=runs/source"]


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


def test_ranks_wait_for_the_one_that_writes_the_initial_weights(trained, workplace):
    """As srun or torchrun may start them: rank 1 has made its model before rank 0 is there."""
    shutil.copytree(trained / "runs" / "digits", workplace / "runs" / "source")
    more = ["num_images=32", "strategy=ddp", "allowed_targets=[spies]", "+callbacks.built._target_=spies.Built"]
    with socket.create_server(("", 0)) as server:
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(server.getsockname()[1])}

    def started(rank: str):
        env = {**world, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost"}
        return command(*HEAD, *more, cwd=workplace, **env)

    second = started("1")
    while not (workplace / "built-1").exists():
        assert second.poll() is None, second.communicate()[0]
        time.sleep(0.05)
    ends = [finish(process) for process in (started("0"), second)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert latest(workplace / "runs" / "head" / "checkpoints").name == "images-000000000032"
