"""Variance statistics are found beside the checkpoint that they are of, and refused elsewhere."""

import pytest
import torch
from safetensors.torch import save_file

from diffusion_trainer.apps import statistics
from diffusion_trainer.conventions import UserError
from diffusion_trainer.process import analytic


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(about):
    log_snr = torch.linspace(-8, 8, 5, dtype=torch.float64)
    return analytic.Statistics(log_snr, torch.rand(5, 1, 8, 8, dtype=torch.float64), about, log_snr.exp())


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
    assert torch.equal(given.decoding, known.decoding)
    assert given.about == known.about
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_statistics_without_costs_of_decoding_are_read(checkpoint):
    path = statistics.path_of(checkpoint, "ema")
    statistics.write(path, table({})._replace(decoding=None))
    assert analytic.read(str(path.resolve())).decoding is None  # a path of its own: what is read is kept


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
