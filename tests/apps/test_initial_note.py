"""A run that goes on stands on the weights that it began with, or says that it cannot."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from written_runs import averages, config_of, write_run

from diffusion_trainer.apps import initial
from diffusion_trainer.apps.initial import FILE, checkpoint_in
from diffusion_trainer.apps.parts import Parts
from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.checkpoint_files import MANIFEST, read_back, sealed

pytestmark = pytest.mark.slow


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


def on_meta(config):
    return Parts.of(config, device="meta").model(torch.float32)


def make(folder):
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def begun(here, shards):
    """(configuration, folder, the weights it was given) of a second stage that has trained a step on its source."""
    source, head = here / "runs" / "source", make(here / "runs" / "head")
    write_run(source, config_of(shards))
    config = config_of(shards, "objective=npr", "init_from=runs/source")
    write_run(head, config, seed=3)
    return config, head, initial.read(head)


def test_those_it_began_with_are_written_again_though_its_source_has_trained_on(begun, here, shards):
    config, head, given = begun
    write_run(here / "runs" / "source", config_of(shards), seed=2, images=64)
    (head / FILE).unlink()
    initial.check(on_meta(config), config, head)
    initial.write(head, "runs/source")
    again = initial.read(head)
    assert given.keys() == again.keys()
    assert all(torch.equal(given[name], again[name]) for name in given)


def gone(source, head):
    shutil.rmtree(checkpoint_in(source))


def trained_anew(source, head):
    folder = checkpoint_in(source)
    tensors = {name: value + 1 for name, value in load_file(folder / "rank-00000.safetensors").items()}
    save_file(tensors, folder / "rank-00000.safetensors")
    manifest = {k: v for k, v in json.loads((folder / MANIFEST).read_text()).items() if k != "crc32"}
    manifest["files"] = {"rank-00000.safetensors": read_back(folder / "rank-00000.safetensors")._asdict()}
    (folder / MANIFEST).write_text(sealed(manifest))


@pytest.mark.parametrize("happened", [gone, trained_anew, lambda *_: shutil.rmtree("runs/source")])
def test_other_weights_than_it_began_with_are_refused(begun, here, shards, happened):
    config, head, _ = begun
    happened(here / "runs" / "source", head)
    initial.check(on_meta(config), config, head)  # it has its own
    (head / FILE).unlink()
    if happened is gone:
        write_run(here / "runs" / "source", config_of(shards), seed=2, images=64)
    with pytest.raises(UserError, match=r"head began with the weights of images-000000000032 of init_from=runs/source"):
        initial.check(on_meta(config), config, head)
    initial.write(head, "runs/source")
    assert not (head / FILE).exists()


def test_weights_that_were_put_in_the_place_of_its_own_are_refused(begun):
    config, head, given = begun
    save_file({name: value + 1 for name, value in given.items()}, head / FILE)
    with pytest.raises(UserError, match=r"neither its initial\.safetensors nor that checkpoint has them any more"):
        initial.check(on_meta(config), config, head)


def test_a_run_that_trains_all_its_weights_goes_on_without_those_it_began_with(here, shards):
    write_run(here / "runs" / "source", config_of(shards))
    config = config_of(shards, "init_from=runs/source")
    write_run(make(here / "runs" / "fine"), config, seed=3)
    (here / "runs" / "fine" / FILE).unlink()
    shutil.rmtree(here / "runs" / "source")
    assert initial.check(on_meta(config), config, here / "runs" / "fine") == ""
    initial.write(here / "runs" / "fine", "runs/source")


def test_a_run_that_has_trained_nothing_yet_takes_the_newest(here, shards):
    write_run(here / "runs" / "source", config_of(shards))
    run = make(here / "runs" / "new")
    initial.write(run, "runs/source")
    (run / FILE).unlink()
    write_run(here / "runs" / "source", config_of(shards), seed=2, images=64)
    config = config_of(shards, "objective=npr", "init_from=runs/source")
    initial.check(on_meta(config), config, run)
    initial.write(run, "runs/source")
    newest = averages(here / "runs" / "source")
    assert all(torch.equal(newest[name], value) for name, value in initial.read(run).items())
    write_run(run, config)  # and from now on these are its own
    initial.check(on_meta(config), config, run)
