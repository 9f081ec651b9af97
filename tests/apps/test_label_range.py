"""A label out of range is a damaged sample; many of them are a wrong conditioning.num_classes, and said to be."""

import pytest
import tiny

from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.train import preflight
from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.writer import write_shards

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("data", ["shards", "latents", "webdataset", "digits"])
@pytest.mark.parametrize(
    ("choice", "num_classes"),
    [("class_label", 10), ("class_label conditioning.num_classes=7", 7), ("none", None), ("embedding", None)],
)
def test_the_labels_of_the_data_have_the_range_of_the_conditioning(data, choice, num_classes):
    config = load("train", [f"data={data}", "data.shards=x.tar", *f"conditioning={choice}".split()], TrainConfig)
    assert config["data"]["fields"]["label"]["num_classes"] == num_classes
    assert build(config["data"], "data").entries["label"].num_classes == num_classes


def labelled(folder, labels, data="digits"):
    """The configuration of a run on images with these labels."""
    samples = ({**s, "cls": str(c).encode()} for s, c in zip(tiny.samples(len(labels)), labels, strict=True))
    write_shards(samples, folder / "labelled", "train", len(labels))
    return load(
        "train",
        ["experiment=digits", f"data={data}", f"data.shards='{folder}/labelled/train-000000.tar'",
         "data.fields.image.channels=1", "data.fields.image.height=8", "data.fields.image.width=8",
         "evaluation=none", *tiny.NETWORK],
        TrainConfig,
    )  # fmt: skip


def test_one_label_out_of_range_is_damage_and_no_end_of_the_run(tmp_path):
    config = labelled(tmp_path, [i % 10 if i != 4 else 10 for i in range(100)])
    preflight(config, 2, tmp_path / "run")
    batch = build(config["data"], "data").first(100)
    assert int(batch["label"].max()) == 9


@pytest.mark.parametrize("data", ["digits", "webdataset"])
@pytest.mark.parametrize("wrong", [range(100), range(0, 100, 2), [7, 50]], ids=["all", "half", "two"])
def test_more_are_a_wrong_number_of_classes_and_named(tmp_path, wrong, data):
    config = labelled(tmp_path, [12 if i in wrong else i % 10 for i in range(100)], data)
    with pytest.raises(
        UserError, match=r"label 12 is out of range: the model has 10 classes.*conditioning.num_classes"
    ):
        preflight(config, 2, tmp_path / "run")


def test_more_are_damage_within_the_budget(tmp_path):
    config = labelled(tmp_path, [12 if i in (7, 50) else i % 10 for i in range(100)])
    config["data"]["damage_budget"] = 0.02
    preflight(config, 2, tmp_path / "run")


def test_a_set_of_one_label_out_of_range_is_named_too(tmp_path):
    config = labelled(tmp_path, [12])
    with pytest.raises(UserError, match=r"label 12.*conditioning.num_classes"):
        preflight(config, 2, tmp_path / "run")
