"""diffusion-trainer inspect, as a person uses it: what it says, its exit code, and no traceback for anything."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import command, finish
from PIL import Image

from diffusion_trainer.apps import cli as console
from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.index import INDEX
from diffusion_trainer.streaming.writer import write_shards


@pytest.fixture
def shards(digits, tmp_path, monkeypatch) -> Path:
    """A copy of the digits, beside which one works."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(digits, tmp_path / "digits"))


@pytest.fixture
def said(capsys):
    """said(*arguments) -> (exit code, output, errors)."""

    def run(*arguments) -> tuple[int, str, str]:
        code = console.run(["inspect", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_digits_are_whole_and_look_like_digits(shards, said):
    code, out, errors = said("digits/train-*.tar", "verify=true", "processes=1", "num_samples=null")
    assert (code, errors) == (0, "")
    for line in (
        "shards: 6",
        "samples: 1,500, 250 a shard",
        f"bytes: {sum(p.stat().st_size for p in shards.glob('train-*.tar')):,}, ",
        "fields, in the 1,500 samples looked at:",
        "  .cls: in 1,500, 1 bytes",
        "       1,500  8 x 8 grey PNG",
        "          10  different values, such as ",
        "damage: none in any byte",
    ):
        assert line in out, line
    picture = np.asarray(Image.open("inspect.png"))
    assert picture.shape == (8 * 33 - 1, 8 * 33 - 1, 3)
    first = picture[:32:4, :32:4, 0]  # enlarged four times
    assert first.max() > 200 > first.min()


def test_damage_is_listed_by_kind_and_shard_and_the_code_is_two(shards, said):
    data = bytearray((shards / "train-000001.tar").read_bytes())
    for sample in (3, 200):
        data[int(np.frombuffer((shards / "train-000001.tar.idx").read_bytes(), "<u8")[sample]) + 600] ^= 4
    (shards / "train-000001.tar").write_bytes(data)
    (shards / "train-000004.tar").unlink()
    code, out, errors = said("digits", "verify=true", "out=null", "num_samples=null")
    assert code == 2
    assert "1,797" in out
    assert errors.splitlines()[0] == "damage: 3 found"
    assert "2 checksum       digits/train-000001.tar: sample 3: its bytes are not" in errors
    assert "1 missing_shard  digits/train-000004.tar: there is no such file; its index has 250 samples" in errors
    assert not Path("inspect.png").exists()
    # A look at a few finds the missing shard alone, and says that it was only a look.
    code, out, errors = said("digits/train-*.tar", "num_samples=5", "out=null")
    assert code == 2
    assert "checksum" not in errors
    assert said("digits/train-000000.tar", "out=null")[1].endswith(
        "damage: none in the 250 samples looked at; verify=true reads all\n"
    )


def test_shards_without_index_and_of_many_kinds(tmp_path, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    sizes = [(300, 200), (10, 20), (40, 40)]
    for i, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 255, (*size, 3)).astype(np.uint8)).save(f"{i}.jpg")
    samples = [
        {"__key__": str(i), "jpg": Path(f"{i}.jpg").read_bytes(), "txt": f"caption {i}\x1b[2J".encode(),
         **{f"extra{j}": b"" for j in range(i * 15)}}
        for i in range(3)
    ]  # fmt: skip
    write_shards(samples, Path("shards"), "a", 2)
    (Path("shards") / INDEX).unlink()
    code, out, _ = said("shards/*.tar", "num_images=3", "out=some/where/a.png", "verify=true")
    assert code == 0
    assert "shards: 2, 2 of them without index" in out
    assert "300 x 200 colour JPEG" in out
    assert "caption 0\\x1b[2J" in out
    assert "\x1b" not in out
    assert "and 12 other extensions" in out
    assert Image.open("some/where/a.png").size == (2 * 129 - 1, 2 * 129 - 1)  # the largest is made smaller


@pytest.mark.parametrize(
    ("arguments", "say"),
    [
        ([], "say which shards"),
        (["verify=true"], "say which shards"),
        (["none-*.tar"], "no file matches none-*.tar"),
        (["digits/*.tar", "verfy=true"], "no file matches verfy=true"),
        (["digits/*.tar", "verify=maybe"], "verify=maybe: input should be a valid boolean"),
        (["digits/*.tar", "num_samples=0"], "num_samples must be positive"),
        (["digits/*.tar", "processes=0"], "processes must be positive"),
        (["digits/*.tar", "num_images=-1"], "num_images must not be negative"),
        (["digits/*.tar", "out=digits"], "out=digits cannot be written"),
        (["digits/*.tar", "out=digits/index.json/a.png"], "cannot be written"),
        (["digits/*.tar", "out=''"], "out=. cannot be written"),
        (["s3://bucket/*.tar"], "no local path"),
        (["digits/{0..tar"], "cannot be read"),
        (["-m", "digits/*.tar", "verify=true,false"], "inspect does not sweep"),
        (["--verify"], "there is no such flag"),
    ],
)
def test_mistakes_are_refused_by_name(shards, arguments, say):
    with pytest.raises(UserError) as error:
        console.run(["inspect", *arguments])
    assert say in str(error.value)


BROKEN = {
    "no JSON": "{",
    "another JSON": "[1]",
    "a list of numbers": '{"shardlist": [1, 2]}',
    "no sizes": '{"shardlist": [{"url": "train-000000.tar", "nsamples": 250}]}',
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_index_is_refused(shards, what):
    (shards / INDEX).write_text(BROKEN[what])
    with pytest.raises(UserError, match="no index of shards"):
        console.run(["inspect", "digits/*.tar"])


@pytest.mark.parametrize(
    "changed", [{"nsamples": 10**30}, {"nsamples": -5}, {"filesize": -1}, {"crc32": -1}, {"url": "../x.tar"}]
)
def test_an_index_that_lies_is_refused(shards, changed):
    index = json.loads((shards / INDEX).read_text())
    index["shardlist"][0] |= changed
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="no index of shards"):
        console.run(["inspect", "digits/*.tar"])


def test_whatever_a_tar_holds_there_is_no_traceback(tmp_path, said, monkeypatch):
    """A shard whose bytes were changed at random, with its old index, a new one, and none."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    array = (
        np.lib.format.magic(1, 0)
        + b"\x76\0{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }"
        + b" " * 60
        + b"\n"
    )
    samples = [{"__key__": f"{i}", "cls": b"1", "npy": array, "json": b'{"a": 1}'} for i in range(8)]
    write_shards(samples, Path("w"), "a", 8)
    whole = Path("w/a-000000.tar").read_bytes()
    for k in range(30):
        data = bytearray(whole[: rng.integers(len(whole))] if k % 3 == 0 else whole)
        for at in rng.integers(0, len(data), 8):
            data[at] = rng.integers(256)
        Path("w/a-000000.tar").write_bytes(data)
        if k == 15:
            Path("w", INDEX).unlink()
        code, _, errors = said("w", "verify=true", "out=null", "processes=1", "num_samples=null")
        assert code == (2 if errors else 0)
        assert code == 2 or k >= 15


@pytest.mark.slow
def test_as_a_command_several_processes_find_the_same(shards):
    (shards / "train-000002.tar").write_bytes((shards / "train-000002.tar").read_bytes()[:100_000])
    name = os.fsdecode(b"caf\xe9-0.tar")  # no UTF-8
    shutil.copy(shards / "train-000000.tar", shards / name)
    outputs = []
    for processes in (1, 2):
        run = command("inspect", "digits", "verify=true", f"processes={processes}", cwd=shards.parent)
        code, output = finish(run)
        assert code == 2, output
        assert "Traceback" not in output
        kept = (line for line in output.splitlines() if not line.startswith("speed:") and " of 9 shards" not in line)
        outputs.append(sorted(kept))
    assert outputs[0] == outputs[1]
    assert any(line.startswith("damage: 202 found") for line in outputs[0]), outputs[0]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(shards):
    (shards / "train-000000.tar").chmod(0)
    with pytest.raises(UserError, match="cannot be"):
        console.run(["inspect", "digits", "verify=true"])
