"""One file of a run's weights that says what it is, and never stands in another's place."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from written_runs import averages, config_of, model_of, write_run

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps import initial
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.conventions import UserError
from diffusion_trainer.training import saving
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoint_files import sealed, write_tensors
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint, latest
from diffusion_trainer.training.ema import KEY
from diffusion_trainer.training.snapshots import Snapshot

pytestmark = pytest.mark.slow

DEFAULT = "runs/plain/exports/images-000000000032-{}.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A folder with the runs plain and young, the latter without an average."""
    folder = tmp_path_factory.mktemp("finished")
    config = config_of(shards)
    write_run(folder / "runs" / "plain", config | {"name": "plain"})
    write_run(folder / "runs" / "young", config, ema=False)
    return folder


@pytest.fixture(autouse=True)
def here(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(*more, run="plain"):
    return console.run(["export", f"checkpoint=runs/{run}", *more])


def refused(*more, run="plain"):
    with pytest.raises(UserError) as error:
        export(*more, run=run)
    return str(error.value)


def equal(found, known):
    return found.keys() == known.keys() and all(torch.equal(found[name], known[name]) for name in known)


def folder_of(run):
    return latest(Path("runs") / run / "checkpoints")


def test_the_average_is_written_where_it_says_bit_for_bit(here, capsys):
    assert export() == 0
    path = here / DEFAULT.format("ema-fp32")
    assert equal(load_file(path), averages(here / "runs" / "plain"))
    line = capsys.readouterr().out
    assert line.startswith(f"ema of images-000000000032: {len(load_file(path))} tensors, ")
    assert line.endswith(f"MB: {DEFAULT.format('ema-fp32')}\n")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("weights", ["raw", "weight"])
def test_raw_weights_have_the_name_of_the_other_verbs_and_that_of_the_checkpoint(here, weights):
    assert export(f"weights={weights}", "out=raw.safetensors") == 0
    found = load_file(here / "raw.safetensors")
    assert equal(found, Checkpoint(folder_of("plain")).whole(WEIGHT))
    assert not equal(found, averages(here / "runs" / "plain"))


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision(here, dtype, torch_dtype):
    assert export(f"dtype={dtype}") == 0
    known = {name: value.to(torch_dtype) for name, value in averages(here / "runs" / "plain").items()}
    assert equal(load_file(here / DEFAULT.format(f"ema-{dtype}")), known)


def test_the_file_alone_is_enough_to_build_the_network(here):
    assert export("out=alone.safetensors", "weights=raw") == 0
    config = (here / "runs" / "plain" / "config.yaml").read_bytes()
    shutil.rmtree(here / "runs")
    with safe_open(here / "alone.safetensors", framework="pt") as file:
        about = file.metadata()
    assert about["config_sha256"] == hashlib.sha256(config).hexdigest()
    known = {"run": "plain", "checkpoint": "images-000000000032", "images_seen": "32", "weights": "weight"}
    assert about | known | {"dtype": "fp32", "format": "pt"} == about
    weights = load_file(here / "alone.safetensors")
    for part in ("network", "conditioning"):
        module = build(json.loads(about[part]), part)
        module.load_state_dict({n.removeprefix(f"{part}."): w for n, w in weights.items() if n.startswith(f"{part}.")})
    for part in ("schedule", "prediction"):
        build(json.loads(about[part]), part)


def put(root, kinds):
    """Writes <root>/images-000000000064."""
    shapes = {n: list(t.shape) for n, t in kinds[KEY].items()}
    tensors = {f"{kind}/{n}/0": t.flatten() for kind, whole in kinds.items() for n, t in whole.items()}
    return saving.write(root, Snapshot(64, 2.0, shapes, "", {}, tensors), Agreement(), keep=9)


@pytest.fixture
def snapshot(here):
    """runs/plain/ema_snapshots/images-000000000064, which holds no weights but the negatives of the averages."""
    return put(
        here / "runs" / "plain" / "ema_snapshots", {KEY: {n: -t for n, t in averages(here / "runs" / "plain").items()}}
    )


def test_a_snapshot_of_averages_is_exported_as_a_checkpoint_is(here, snapshot):
    assert console.run(["export", f"checkpoint='{snapshot}'", "out=model.safetensors"]) == 0
    known = {n: -t for n, t in averages(here / "runs" / "plain").items()}
    assert equal(load_file(here / "model.safetensors"), known)
    with safe_open(here / "model.safetensors", framework="pt") as file:
        assert (file.metadata()["run"], file.metadata()["images_seen"]) == ("plain", "64")
    with pytest.raises(UserError, match="has no raw weights; it has weights=ema"):
        console.run(["export", f"checkpoint='{snapshot}'", "weights=raw"])


def test_a_checkpoint_that_lacks_some_of_the_weights_is_damaged(here, snapshot):
    """Even if its manifest agrees."""
    name, tensor = next(iter(averages(here / "runs" / "plain").items()))
    written = write_tensors(snapshot / "rank-00001.safetensors", {f"{KEY}/{name}/0": tensor.flatten()})
    manifest = json.loads((snapshot / "manifest.json").read_text())
    manifest["files"] = {"rank-00001.safetensors": written._asdict()}
    manifest["parameters"] = {n: s for n, s in manifest["parameters"].items() if n in list(manifest["parameters"])[:2]}
    manifest["parameters"] = {n: s if n == name else [1] for n, s in manifest["parameters"].items()}
    (snapshot / "manifest.json").write_text(sealed({k: v for k, v in manifest.items() if k != "crc32"}))
    with pytest.raises(UserError, match=r"manifest.json is damaged: none of its files holds ema of"):
        console.run(["export", f"checkpoint='{snapshot}'", "out=model.safetensors"])


def test_unknown_weights_are_refused_with_those_that_there_are(here):
    assert refused("weights=emma").endswith("has no emma weights; it has weights=raw or ema; did you mean ema?")
    assert refused("weights=exp_avg").endswith("has no exp_avg weights; it has weights=raw or ema")
    young = "has no ema weights; it has weights=raw; it is from before the first step, which begins the average"
    assert young in refused(run="young")
    assert export("weights=raw", run="young") == 0


@pytest.mark.parametrize("weights", ["long", "ema.long"])
def test_another_average_is_found_by_its_profile_and_by_its_kind(here, weights):
    """A checkpoint whose second average is Adam's first moment: another set of numbers of the same shapes."""
    checkpoint = Checkpoint(folder_of("plain"))
    known = checkpoint.whole("exp_avg")
    kinds = {WEIGHT: checkpoint.whole(WEIGHT), KEY: checkpoint.whole(KEY), "ema.long": known}
    put(here / "runs" / "plain" / "checkpoints", kinds)
    assert export(f"weights={weights}", "out=model.safetensors") == 0
    assert equal(load_file(here / "model.safetensors"), known)


@pytest.mark.parametrize(
    ("override", "say"),
    [
        ("dtype=fp64", "dtype=fp64: input should be 'fp32', 'bf16' or 'fp16'"),
        ("out=model.pt", "out=model.pt must end in .safetensors"),
        ("weight=raw", "there is no option weight; did you mean weights?"),
        ("out=/proc/x.safetensors", "out=/proc/x.safetensors cannot be written"),
        ("out=config.yaml/x.safetensors", "cannot be written"),
        ("checkpoint=runs/none", "checkpoint=runs/none: there is no checkpoint"),
    ],
)
def test_a_mistake_is_explained(here, override, say):
    (here / "config.yaml").write_text("a file")
    assert say in refused(override)
    with pytest.raises(UserError, match="checkpoint is missing: say checkpoint=runs/<name>"):
        console.run(["export"])


def test_only_an_earlier_export_is_replaced_and_only_when_asked(here):
    out = here / "model.safetensors"
    assert export("out=model.safetensors") == 0
    assert "exists; replace it with overwrite=true" in refused("out=model.safetensors", "weights=raw")
    assert equal(load_file(out), averages(here / "runs" / "plain"))
    assert export("out=model.safetensors", "weights=raw", "overwrite=true") == 0
    assert equal(load_file(out), Checkpoint(folder_of("plain")).whole(WEIGHT))


def test_nothing_else_is_ever_replaced(here):
    save_file({"a": torch.ones(1)}, here / "other.safetensors")
    (here / "text.safetensors").write_text("notes")
    (here / "folder.safetensors").mkdir()
    rank = next(folder_of("plain").glob("rank-*.safetensors"))
    before = rank.read_bytes()
    for stranger in ("other.safetensors", "text.safetensors", "folder.safetensors", rank):
        assert "was not written by export and is not replaced" in refused(f"out='{stranger}'", "overwrite=true")
    assert rank.read_bytes() == before


def ends_with_2(capsys, monkeypatch, *more):
    """The message of the command, as the shell has it."""
    monkeypatch.setattr(sys, "argv", ["diffusion-trainer", "export", "checkpoint=runs/plain", *more])
    capsys.readouterr()
    assert console._main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    return said.err


def test_a_full_disk_leaves_what_was_there(here, capsys, monkeypatch):
    assert export("out=model.safetensors") == 0
    before = (here / "model.safetensors").read_bytes()
    (here / ".model.safetensors.part").symlink_to("/dev/full")  # a real ENOSPC, where the file is written
    error = ends_with_2(capsys, monkeypatch, "out=model.safetensors", "weights=raw", "overwrite=true")
    assert "out=model.safetensors cannot be written ([Errno 28] No space left on device)" in error
    assert (here / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in here.iterdir()) == ["model.safetensors", "runs"]


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest", "bit"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(here, capsys, monkeypatch, damage):
    folder = folder_of("plain")
    rank, manifest = next(folder.glob("rank-*.safetensors")), folder / "manifest.json"
    if damage == "cut":
        rank.write_bytes(rank.read_bytes()[:-4])
    elif damage == "gone":
        rank.unlink()
    elif damage == "bit":  # found by its checksum, when the first number is asked for
        data = bytearray(rank.read_bytes())
        data[-1] ^= 1
        rank.write_bytes(data)
    else:
        manifest.write_text(manifest.read_text()[:-20])
    assert folder.name in ends_with_2(capsys, monkeypatch, "out=exported/model.safetensors")
    assert list(here.glob("exported/*")) == []


def test_a_checkpoint_that_turns_out_to_be_incomplete_leaves_no_file(here, capsys, monkeypatch):
    read = Checkpoint.read

    def lacking(self, kind, name, first, count):
        if name == list(self.shapes)[-1]:
            raise UserError(f"checkpoint {self.folder} holds 0 of {count} elements of {kind} of {name}")
        return read(self, kind, name, first, count)

    monkeypatch.setattr(Checkpoint, "read", lacking)
    assert "holds 0 of" in ends_with_2(capsys, monkeypatch, "out=exported/model.safetensors")
    assert list((here / "exported").iterdir()) == []


def test_no_process_group_and_no_model_is_made(here, monkeypatch):
    def never(*_, **__):
        raise AssertionError("an export reads numbers and writes numbers")

    monkeypatch.setattr(torch.distributed, "init_process_group", never)
    monkeypatch.setattr(torch.nn.Module, "__init__", never)
    monkeypatch.setattr(torch.cuda, "init", never)
    assert export() == 0


def test_a_run_starts_from_an_export_as_from_the_run_itself(here, shards):
    assert export("out=model.safetensors") == 0
    shutil.rmtree(here / "runs" / "plain")
    config = config_of(shards, "init_from=model.safetensors")
    new, known = here / "runs" / "new", load_file(here / "model.safetensors")
    said = initial.check(model_of(config), config, new)
    assert said == f"{len(known)} of {len(known)} tensors are those of init_from=model.safetensors"
    write_run(new, config)
    assert equal(initial.read(new), known)
    assert json.loads((new / initial.NOTE).read_text())["checkpoint"] == "model.safetensors"
    (new / initial.FILE).unlink()  # those it began with are in the export still, and known by their digest
    initial.write(new, "model.safetensors")
    assert equal(initial.read(new), known)
    (here / "model.safetensors").unlink()  # it is needed no longer
    initial.check(model_of(config), config, new)


def test_a_second_stage_on_an_export_must_read_it_as_it_was_trained(here, shards):
    assert export("out=model.safetensors") == 0
    same, other = (
        config_of(shards, "objective=npr", "init_from=model.safetensors", f"prediction={name}")
        for name in ("epsilon", "v")
    )
    assert "are those of init_from=model.safetensors" in initial.check(model_of(same), same, here / "runs" / "new")
    with pytest.raises(UserError, match=r"init_from=model.safetensors was trained with another prediction"):
        initial.check(model_of(other), other, here / "runs" / "new")
    (here / "model.safetensors").write_bytes((here / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"init_from=model.safetensors is no run and no whole safetensors file"):
        initial.check(model_of(same), same, here / "runs" / "new")


def test_half_precision_is_widened_where_a_run_starts_from_it(here, shards):
    assert export("out=model.safetensors", "dtype=bf16") == 0
    config = config_of(shards, "init_from=model.safetensors")
    model, known = model_of(config), load_file(here / "model.safetensors")
    initial.write(here / "runs" / "young", "model.safetensors")
    initial.apply(model, initial.read(here / "runs" / "young"), "model.safetensors")
    assert equal(dict(model.named_parameters()), {name: value.float() for name, value in known.items()})
