"""Aspect buckets from the files on: in every step all ranks have images of one shape, and they are the right ones."""

import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image as Pillow
from streaming.flaky import serving
from streaming.making import Number

from diffusion_trainer.apps import rank, train
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.folder import write_config
from diffusion_trainer.apps.index import main as make_index
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.cached import CachedStore
from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.streaming.images import CenterCrop, Image
from diffusion_trainer.streaming.indexing import index
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.writer import write_shards
from diffusion_trainer.training.checkpoints import Checkpoint, latest
from diffusion_trainer.training.module import DiffusionModule

pytestmark = pytest.mark.slow

TALL, WIDE = (64, 32), (32, 64)
COUNT, BATCH, PERIOD = 60, 8, 6
ORDER = (3, 4)  # seed, lanes


def shape_of(number: int) -> tuple[int, int]:
    return TALL if number % 3 else WIDE


def pixels(number: int, scale: int = 1) -> np.ndarray:
    """Of image `number`: nothing else looks like it."""
    height, width = shape_of(number)
    draws = np.random.default_rng(number)
    return draws.integers(0, 256, (height // scale, width // scale, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(array).save(file, "png")
    return file.getvalue()


def write(folder: Path, broken: set[int] = frozenset(), name: str = "a", scale: int = 1) -> list[Path]:
    """Three shards; the broken ones say their size in their header, and end in the middle."""
    images = {n: png(pixels(n, scale)) for n in range(COUNT)}
    whole = {n: data[: len(data) // 2] if n in broken else data for n, data in images.items()}
    samples = ({"__key__": f"{n:04d}", "png": data, "cls": b"%d" % n} for n, data in whole.items())
    paths = write_shards(samples, folder, name, COUNT // 3)
    index(paths, 1, image_sizes=True)
    return paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("images")
    write(folder)
    return folder


def data_of(shards: str, **options) -> ShardData:
    fields = {"image": Image(3, 32, 32, CenterCrop()), "label": Number()}
    return ShardData(fields, shards, buckets=[TALL, WIDE], window=4, mixing_period=PERIOD, **options)


def steps_of(data: ShardData, world: int = 1, last: int = 12) -> list[list[dict]]:
    """Of each step, what each rank has."""
    ranks = [list(data.loader(Layout(BATCH, world, r), *ORDER, 0, last)) for r in range(world)]
    return list(zip(*ranks, strict=True))


def joined(step: list[dict]) -> list[int]:
    """The labels of a global batch in its order; its images are of one shape, and those of its labels."""
    assert {tuple(piece["image"].shape[1:]) for piece in step} == {(3, *shape_of(int(step[0]["label"][0])))}
    for piece in step:
        for image, label in zip(piece["image"], piece["label"].tolist(), strict=True):
            assert (image.permute(1, 2, 0).numpy() == pixels(label)).all()
    return torch.stack([piece["label"] for piece in step], 1).ravel().tolist()


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (4, 0), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_in_every_step_all_ranks_have_one_shape_and_the_images_of_a_process_alone(folder, world, workers):
    truth = [joined(step) for step in steps_of(data_of(f"{folder}/*.tar"))]
    found = [joined(step) for step in steps_of(data_of(f"{folder}/*.tar", num_workers=workers), world)]
    assert found == truth
    assert [shape_of(labels[0]) for labels in truth].count(WIDE) == 12 / 3
    assert len({label for labels in truth for label in labels}) == COUNT


def test_from_a_server_they_are_those_of_the_files(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    local = data_of(f"{folder}/*.tar")
    with serving(folder) as server:
        remote = data_of(f"{server.url}/*.tar", store=CachedStore(str(tmp_path), 1 << 24))
        assert [joined(step) for step in steps_of(remote)] == [joined(step) for step in steps_of(local)]
        assert remote.fingerprint == local.fingerprint


@pytest.mark.parametrize("world", [1, 2])
def test_a_broken_image_is_replaced_by_one_of_its_shape(tmp_path, world):
    broken = {0, 7, 30}  # wide, tall, wide
    write(tmp_path, broken)
    steps = steps_of(data_of(f"{tmp_path}/*.tar"), world, 24)
    labels = [joined(step) for step in steps]
    assert broken.isdisjoint(label for step in labels for label in step)
    found = {(f.kind, Path(f.shard).name, f.sample) for step in steps for piece in step for f in piece["damage"]}
    assert found == {("undecodable", f"a-{n // 20:06d}.tar", n % 20) for n in broken}


def test_an_image_whose_size_nobody_knows_goes_with_the_first_shape_and_is_damage(tmp_path):
    samples = [{"__key__": f"{n:04d}", "png": png(pixels(n)), "cls": b"%d" % n} for n in range(COUNT)]
    samples[0]["png"] = b"no image"  # would be wide
    index(write_shards(iter(samples), tmp_path, "a", 20), 1, image_sizes=True)
    steps = steps_of(data_of(f"{tmp_path}/*.tar"), 1, 24)
    with_damage = [step for step in steps if step[0]["damage"]]
    assert {(f.sample, Path(f.shard).name) for step in with_damage for f in step[0]["damage"]} == {(0, "a-000000.tar")}
    assert {shape_of(joined(step)[0]) for step in with_damage} == {TALL}


# Sizes that are not those of the shards


def swapped(data: bytes) -> bytes:
    """As if the images had been turned: of the right length, and possible."""
    return np.frombuffer(data, "<u4").reshape(-1, 2)[:, ::-1].tobytes()


def change_sizes(change):
    def do(paths: list[Path]) -> None:
        path = Path(f"{paths[1]}.size")
        path.write_bytes(change(path.read_bytes()))

    return do


def write_again(paths: list[Path]) -> None:
    """Images of other shapes, their order turned, through the writer."""
    turned = ((f"{n:04d}", pixels(COUNT - 1 - n), n) for n in range(COUNT))
    samples = ({"__key__": key, "png": png(array), "cls": b"%d" % n} for key, array, n in turned)
    write_shards(samples, paths[0].parent, "a", COUNT // 3)


WRONG = {
    "other sizes": change_sizes(swapped),
    "sizes of fewer": change_sizes(lambda data: data[:-8]),
    "no sizes": lambda paths: Path(f"{paths[1]}.size").unlink(),
    "indexed again without": lambda paths: index(paths, 1, again=True),
    "written again": write_again,
}


@pytest.mark.parametrize("name", WRONG)
def test_sizes_that_are_not_those_of_the_index_are_an_error_and_its_command_makes_them(tmp_path, name):
    paths = write(tmp_path)
    WRONG[name](paths)
    if name in ("indexed again without", "written again"):
        assert not list(tmp_path.glob("*.size"))  # what is left of before would be taken for theirs
    with pytest.raises(UserError) as refused:
        steps_of(data_of(f"{tmp_path}/*.tar"))
    (command,) = re.findall(r"diffusion-trainer index ('[^']+'(?: \w+=\w+)*)", str(refused.value))
    assert command.endswith("again=true image_sizes=true")
    pattern, *options = shlex.split(command)
    assert Path(pattern) in paths
    assert make_index([f"{tmp_path}/*.tar", *options]) == 0
    for (piece,) in steps_of(data_of(f"{tmp_path}/*.tar")):
        labels = piece["label"].tolist()
        of = [COUNT - 1 - n for n in labels] if name == "written again" else labels
        assert all((i.permute(1, 2, 0).numpy() == pixels(n)).all() for i, n in zip(piece["image"], of, strict=True))


def test_a_set_of_its_name_takes_the_sizes_of_shards_that_are_no_more_with_it(tmp_path):
    write(tmp_path)
    write_shards(({"__key__": f"{n}", "png": png(pixels(n))} for n in range(20)), tmp_path, "a", 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a-000000.tar", "a-000000.tar.crc", "a-000000.tar.idx", "index.json",
    ]  # fmt: skip


# Runs


@pytest.fixture
def run(tmp_path):
    """A configuration whose images are 16x8 and 8x16, and its folder."""
    write(tmp_path / "images", scale=4)

    def make(buckets: str) -> tuple[dict, Path]:
        overrides = [
            "experiment=digits", "data=shards", f"data.shards='{tmp_path}/images/*.tar'", f"data.buckets={buckets}",
            "data.fields.image.height=16", "data.fields.image.width=16", "data.fields.label=null", "conditioning=none",
            "guidance=none", "data.fields.image.geometry._target_=diffusion_trainer.streaming.images.CenterCrop",
            "data.window=4", "data.mixing_period=6", "data.num_workers=0", "batch_size=8", "lanes=4", "num_images=96",
            *tiny.NETWORK, "network.attention_levels=[]", "evaluation=none", "callbacks.evaluate=null", "logger=csv",
            "strategy=single", "trainer.accelerator=cpu", f"folder='{tmp_path}/run'",
        ]  # fmt: skip
        return load("train", overrides, TrainConfig), tmp_path / "run"

    return make


def test_preflight_tries_the_network_with_every_shape(run):
    config, folder = run("[[16,16],[16,8],[8,16]]")
    train.preflight(config, 1, folder)
    config, folder = run("[[16,16],[16,8],[7,14]]")
    with pytest.raises(UserError, match="7"):
        train.preflight(config, 1, folder)


@pytest.mark.filterwarnings("ignore")
def test_a_run_trains_on_every_shape(run, monkeypatch):
    config, folder = run("[[16,8],[8,16]]")
    folder.mkdir()
    write_config(folder, config)
    shapes = []
    step = DiffusionModule.training_step

    def spy(self, batch, *rest):
        shapes.append(tuple(batch["image"].shape[2:]))
        return step(self, batch, *rest)

    monkeypatch.setattr(DiffusionModule, "training_step", spy)
    assert rank.work(config, folder, World(0, 1, 1, False)) == 0
    assert (shapes.count((16, 8)), shapes.count((8, 16))) == (8, 4)
    assert Checkpoint(latest(folder / "checkpoints")).images_seen == 96
