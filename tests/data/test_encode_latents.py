"""Latents and embeddings are what the encoders say of each sample, whoever asks them, and with interruptions."""

import io
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from scripts import DATA, call, encode_latents, picture, start, tars
from torch import Tensor, nn

from diffusion_trainer.streaming.writer import write_shards

COUNT = 50


class ImageEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, stride=4, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.linspace(-1, 1, self.conv.weight.numel()).sin().view_as(self.conv.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh()


class SlowEncoder(ImageEncoder):
    """Some milliseconds more."""

    def forward(self, x: Tensor) -> Tensor:
        work = torch.ones(256, 256)
        for _ in range(30):
            work = work @ work / 256
        return self.conv(x).tanh() + 0 * work.sum()


class TextEncoder(nn.Module):
    """(B, L, D): one-hot letters, and where they stand."""

    def forward(self, texts: list[str]) -> Tensor:
        out = torch.zeros(len(texts), 6, 27)
        for i, text in enumerate(texts):
            for j, letter in enumerate(text[:6]):
                out[i, j, max(0, min(ord(letter) - 96, 26))] = float(j + 1)
        return out


class Constant(nn.Module):
    """What an encoder must not say."""

    def __init__(self, value: float, rows: int = -1):
        super().__init__()
        self.value, self.rows = value, rows

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x) if self.rows < 0 else self.rows, 2, 3, 3), self.value)


def image_of(i: int) -> bytes:
    return picture(i, (16, 16), format="png" if i % 3 else "jpeg")


def sample(i: int) -> dict:
    return {
        "__key__": f"deep/er/{i:04d}", "png" if i % 3 else "jpg": image_of(i), "cls": b"%d" % (i % 7),
        "txt": f"the text {'abcdefg'[i % 7]}".encode(), "json": json.dumps({"i": i}).encode(), "mask": b"not carried",
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """in/: five shards of 12, the last one of 2; encoders image.pt and text.pt."""
    folder = tmp_path_factory.mktemp("made")
    write_shards(map(sample, range(COUNT)), folder / "in", "train", 12)
    for name, module in {"image": ImageEncoder(), "text": TextEncoder()}.items():
        torch.jit.script(module).save(folder / f"{name}.pt")
    return folder


@pytest.fixture
def recipe(made, tmp_path, monkeypatch):
    """recipe(*arguments) -> exit code; shards in tmp_path/out."""

    def run(*arguments: object, source: Path = made / "in", out: str = "out", texts: bool = True) -> int:
        encoders = ["--image-encoder", made / "image.pt", *(["--text-encoder", made / "text.pt"] if texts else [])]
        encoders = [] if "--image-encoder" in arguments else encoders
        monkeypatch.chdir(tmp_path)
        return call(encode_latents, monkeypatch, f"{source}/train-*.tar", "--out", out, *encoders, *arguments)

    return run


def read(folder: Path) -> list[dict]:
    paths = [str(p) for p in sorted(folder.glob("train-*.tar"))]
    return list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))


def array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))


def truth(*images: bytes) -> np.ndarray:
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
    with torch.no_grad():
        return ImageEncoder()(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).numpy()


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_samples_are_what_the_encoders_say_of_them(recipe, tmp_path, batch):
    assert recipe("--dtype", "float32", "--batch-size", batch) == 0
    found = read(tmp_path / "out")
    assert [s["__key__"] for s in found] == [sample(i)["__key__"] for i in range(COUNT)]
    latents = np.stack([array(s["latent.npy"]) for s in found])
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, truth(*map(image_of, range(COUNT))), atol=1e-6)
    texts = TextEncoder()([sample(i)["txt"].decode() for i in range(COUNT)]).numpy()
    np.testing.assert_array_equal(np.stack([array(s["text.npy"]) for s in found]), texts)
    for i, s in enumerate(found):
        assert {name: s[name] for name in ("cls", "txt", "json")} == {n: sample(i)[n] for n in ("cls", "txt", "json")}
        assert {n for n in s if not n.startswith("__")} == {"cls", "txt", "json", "latent.npy", "text.npy"}
    assert len(list((tmp_path / "out").glob("*.tar"))) == 5


def test_half_precision_is_rounded_once(recipe, tmp_path):
    assert recipe("--scale", 0.18215) == 0
    exact = truth(*map(image_of, range(COUNT))) * 0.18215
    latents = np.stack([array(s["latent.npy"]) for s in read(tmp_path / "out")])
    assert latents.dtype == np.float16
    np.testing.assert_allclose(latents, exact, rtol=2**-10, atol=1e-6)
    record = json.loads((tmp_path / "out" / "train.json").read_text())["latents"]
    np.testing.assert_allclose(latents.astype(float) * record["std"] + record["mean"], exact / 0.18215, atol=1e-3)


def test_normalized_channels_have_mean_0_and_deviation_1(recipe, tmp_path):
    assert recipe("--normalize", 10**6, "--dtype", "float32", texts=False) == 0
    latents = np.stack([array(s["latent.npy"]) for s in read(tmp_path / "out")])
    np.testing.assert_allclose(latents.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(latents.std((0, 2, 3)), 1, atol=1e-5)
    record = json.loads((tmp_path / "out" / "train.json").read_text())["latents"]
    mean, std = (np.array(record[name])[:, None, None] for name in ("mean", "std"))
    np.testing.assert_allclose(latents * std + mean, truth(*map(image_of, range(COUNT))), atol=1e-5)


def test_the_first_samples_of_shards_all_over_the_set_are_measured(recipe, tmp_path):
    assert recipe("--normalize", 10, texts=False) == 0
    measured = truth(*(image_of(12 * k + i) for k in range(5) for i in range(2)))
    record = json.loads((tmp_path / "out" / "train.json").read_text())["latents"]
    np.testing.assert_allclose(record["mean"], measured.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(record["std"], measured.std((0, 2, 3)), atol=1e-6)


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_ranks_write_what_one_does(recipe, tmp_path, monkeypatch, capsys, variables):
    assert recipe("--normalize", 10) == 0
    for rank in (1, 2, 0):
        for name, value in zip(variables, (rank, 3, rank), strict=True):
            monkeypatch.setenv(name, str(value))
        assert recipe("--normalize", 10, out="shared") == 0
        assert bool(tars(tmp_path / "shared")) == (rank == 0)
    assert "appears in shared when those of all ranks are" in capsys.readouterr().out
    assert tars(tmp_path / "shared") == tars(tmp_path / "out")


@pytest.mark.slow
def test_two_real_ranks_that_are_killed_and_started_again_as_one(made, recipe, tmp_path):
    """SIGKILL in the middle; another number of ranks goes on."""
    write_shards(map(sample, range(900)), tmp_path / "in", "train", 15)
    torch.jit.script(SlowEncoder()).save(tmp_path / "slow.pt")
    encoders = ("--image-encoder", tmp_path / "slow.pt", "--text-encoder", made / "text.pt")
    common = (*encoders, "--normalize", 40, "--batch-size", 4)
    assert recipe(*common, source=tmp_path / "in") == 0
    arguments = (tmp_path / "in" / "train-*.tar", *common, "--out", "cut")
    ranks = [start("encode_latents", *arguments, cwd=tmp_path, RANK=str(r), WORLD_SIZE="2") for r in range(2)]
    part, deadline = tmp_path / "cut" / ".train.part", time.monotonic() + 100
    while len(list(part.glob("*.tar.json"))) < 6:
        assert [rank.poll() for rank in ranks] == [None, None], [rank.communicate()[0] for rank in ranks]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()
    before = {p.name: p.stat().st_ino for p in part.glob("*.tar") if Path(f"{p}.json").exists()}
    assert 6 <= len(before) < 60
    assert not tars(tmp_path / "cut")
    again = start("encode_latents", *arguments, cwd=tmp_path)
    output = again.communicate(timeout=100)[0]
    assert again.returncode == 0, output
    assert {name: (tmp_path / "cut" / name).stat().st_ino for name in before} == before
    assert tars(tmp_path / "cut") == tars(tmp_path / "out")


def test_text_alone_leaves_the_images_in_place(recipe, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = (f"{made}/in/train-*.tar", "--out", "out", "--text-encoder", made / "text.pt")
    assert call(encode_latents, monkeypatch, *source) == 0
    found = read(tmp_path / "out")
    assert [s.get("png") or s.get("jpg") for s in found] == [image_of(i) for i in range(COUNT)]
    assert all("text.npy" in s and "latent.npy" not in s for s in found)
    assert "latents" not in json.loads((tmp_path / "out" / "train.json").read_text())


SIZES = ((16, 16), (16, 24), (40, 24))


def test_images_of_several_shapes(recipe, tmp_path):
    images = [picture(i, SIZES[i % 3], format="png") for i in range(20)]
    write_shards(({"__key__": f"{i}", "png": data} for i, data in enumerate(images)), tmp_path / "in", "train", 10)
    assert recipe("--dtype", "float32", source=tmp_path / "in", texts=False) == 0
    for i, s in enumerate(read(tmp_path / "out")):
        np.testing.assert_allclose(array(s["latent.npy"]), truth(images[i])[0], atol=1e-6)
    assert recipe("--size", 8, source=tmp_path / "in", texts=False, out="square") == 0
    assert {array(s["latent.npy"]).shape for s in read(tmp_path / "square")} == {(4, 2, 2)}


def test_a_size_takes_the_middle_square(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    file = io.BytesIO()
    Image.fromarray(wide).save(file, format="png")
    np.testing.assert_array_equal(encode_latents.pixels(file.getvalue(), 10), np.full((10, 10, 3), 200))


def test_damaged_samples_are_left_out_and_listed(recipe, tmp_path, capsys):
    rows = [sample(i) for i in range(12)]
    rows[2]["png"] = b"<html>"
    rows[4]["png"] = image_of(4)[:100]
    del rows[5]["txt"]
    rows[7]["txt"] = b"\xff\xfe"
    del rows[8]["png"]
    paths = write_shards(rows, tmp_path / "in", "train", 6)
    data = bytearray(paths[1].read_bytes())
    data[data.index(image_of(10)) + 50] ^= 1  # after the index was made
    paths[1].write_bytes(data)
    assert recipe(source=tmp_path / "in") == 0
    assert [s["__key__"][-1] for s in read(tmp_path / "out")] == ["0", "1", "3", "6", "9", "1"]
    said = capsys.readouterr().err
    assert "6 items were left out" in said
    for why in (
        "0002: it is no JPEG",
        "0004: the PNG is truncated",
        "has no txt",
        "not UTF-8",
        "has no image",
        "not those that were",
    ):
        assert why in said
    assert recipe("--strict", source=tmp_path / "in", out="strict") == 2
    assert not tars(tmp_path / "strict")


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (Constant(float("nan")), "nothing could be used: .*latent.npy is not finite as float16"),
        (Constant(1e5), "nothing could be used: .*not finite as float16"),
        (Constant(1.0, rows=3), r"makes \(3, 2, 3, 3\) of images .* should be a tensor \(12, ...\)"),
        (nn.Linear(5, 5), "fails on images"),
        (nn.Identity(), None),
    ],
)
def test_what_encoders_must_not_say(recipe, tmp_path, capsys, module, complaint):
    torch.jit.script(module).save(tmp_path / "odd.pt")
    code = recipe("--image-encoder", tmp_path / "odd.pt")
    assert code == (2 if complaint else 0)
    if complaint:
        assert re.search(complaint, capsys.readouterr().err)


def test_a_channel_that_is_constant_cannot_be_normalized(recipe, tmp_path, capsys):
    torch.jit.script(Constant(3.0)).save(tmp_path / "flat.pt")
    assert recipe("--image-encoder", tmp_path / "flat.pt", "--normalize", 8) == 2
    assert "a channel is constant" in capsys.readouterr().err


def test_mistakes_exit_with_2(recipe, made, tmp_path, monkeypatch, capsys):
    source = f"{made}/in/train-*.tar"
    for arguments, complaint in (
        ((source,), "say what to encode with"),
        ((source, "--image-encoder", tmp_path / "gone.pt"), "gone.pt is no TorchScript file"),
        ((source, "--image-encoder", DATA / "shapes.py"), "shapes.py is no TorchScript file"),
        ((source, "--image-encoder", made / "image.pt", "--scale", 0), "--scale must not be 0"),
        ((source, "--image-encoder", made / "image.pt", "--scale", 2, "--normalize", 9), "no use together"),
        ((source, "--text-encoder", made / "text.pt", "--normalize", 9), "--normalize is for latents"),
        ((source, "--image-encoder", made / "image.pt", "--dtype", "int8"), "invalid choice"),
        (("nowhere/*.tar", "--image-encoder", made / "image.pt"), "no file matches"),
    ):
        assert call(encode_latents, monkeypatch, *arguments, "--out", tmp_path / "out") == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_shards_stop_it(recipe, tmp_path, capsys):
    paths = write_shards(map(sample, range(20)), tmp_path / "in", "train", 10)
    paths[1].unlink()
    assert recipe(source=tmp_path / "in") == 2
    assert "train-000001.tar: there is no such file" in capsys.readouterr().err


def test_another_encoder_is_another_set(recipe, tmp_path, capsys):
    assert recipe() == 0
    torch.jit.script(nn.Identity()).save(tmp_path / "other.pt")
    assert recipe("--image-encoder", tmp_path / "other.pt") == 2
    assert "image_encoder was" in capsys.readouterr().err
