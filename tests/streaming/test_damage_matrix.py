"""Every kind of damage, counted exactly: the same report and the same batches whoever reads them, and nothing lost."""

import os
import re
import shlex
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from streaming.making import END, indexed, member, members_of, npy, row, shard_bytes, shard_data, whole, write_set

from diffusion_trainer.apps.index import main as make_index
from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.batches import MAX_ATTEMPTS
from diffusion_trainer.streaming.damage import Damage
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.mixing import Mix
from diffusion_trainer.streaming.order import Order
from diffusion_trainer.streaming.stores import LocalStore

pytestmark = pytest.mark.slow

SHARDS, SAMPLES, SIZE = 5, 12, 2048  # bytes of a sample: two members of a header and a block
BATCH, STEPS = 12, range(0, 10)  # two epochs
ORDER = {"seed": 5, "lanes": 4}
WINDOW = 6
LAYOUTS = [(1, 1, 0), (2, 2, 0), (4, 1, 0), (1, 3, 1)]  # world, micro-batches, workers
TAR = "x-001.tar"
REST = dict.fromkeys


def cut(at: int, name: str = TAR):
    return lambda folder: os.truncate(folder / name, at)


def write(data: bytes):
    return lambda folder: (folder / TAR).write_bytes(data)


def put(at: int, change):
    """Replaces bytes of a shard after it was indexed."""

    def damage(folder):
        data = bytearray((folder / TAR).read_bytes())
        new = change(bytes(data[at:]))
        data[at : at + len(new)] = new
        (folder / TAR).write_bytes(data)

    return damage


def flip(at: int):
    return put(at, lambda data: bytes([data[0] ^ 4]))


def sample(i: int, change):
    """Writes the shard with other members in sample i, and indexes that."""

    def damage(folder):
        numbers = range(SAMPLES, 2 * SAMPLES)
        made = [m for k, n in enumerate(numbers) for m in (change if k == i else lambda m: m)(members_of(n))]
        indexed(folder / TAR, b"".join(member(*m) for m in made) + END)

    return damage


def member_of(i: int, extension: str, data: bytes):
    return sample(i, lambda found: [(n, data if n.endswith(extension) else d) for n, d in found])


def sidecar(suffix: str, at: int):
    def damage(folder):
        path = folder / f"{TAR}{suffix}"
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return damage


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


# name -> what is done, and which samples of the shard have which kind
MATRIX = {
    "nothing": (lambda folder: None, {}),
    "cut within a member": (cut(3 * SIZE + 1700), REST(range(3, 12), "truncated")),
    "cut within a header": (cut(3 * SIZE + 1100), REST(range(3, 12), "truncated")),
    "cut at a member's border": (cut(3 * SIZE + 1024), REST(range(3, 12), "truncated")),
    "cut at a sample's border": (cut(5 * SIZE), REST(range(5, 12), "truncated")),
    "only the end mark is gone": (cut(12 * SIZE), {}),
    "cut within the first header's member": (cut(600), REST(range(12), "truncated")),
    "cut behind the first header": (cut(512), REST(range(12), "truncated")),
    "zeros behind the first header": (
        put(512, lambda data: bytes(len(data))),
        REST(range(12), "checksum"),
    ),
    "an empty file": (cut(0), REST(range(12), "truncated")),
    "a bit of data": (flip(4 * SIZE + 512), {4: "checksum"}),
    "a bit of padding": (flip(4 * SIZE + 1000), {4: "checksum"}),
    "a bit of a header": (flip(4 * SIZE + 1027), {4: "checksum"}),
    "a block of zeros": (put(4 * SIZE, lambda data: bytes(512)), {4: "checksum"}),
    "a hole over two samples": (put(4 * SIZE + 1024, lambda data: bytes(2048)), {4: "checksum", 5: "checksum"}),
    "a missing shard": (lambda folder: os.unlink(folder / TAR), REST(range(12), "missing_shard")),
    "a page of HTML": (write(b"<html>503</html>".ljust(3000)), {0: "checksum", **REST(range(1, 12), "truncated")}),
    "a bit of all samples but one": (
        both(*(flip(k * SIZE + 512 + 16 * k) for k in range(12) if k != 9)),
        REST({*range(12)} - {9}, "checksum"),
    ),
    "a missing field": (sample(2, lambda found: found[:1]), {2: "missing_field"}),
    "a member that is no array": (member_of(2, "npy", b"garbage"), {2: "undecodable"}),
    "a class that is no number": (member_of(2, "cls", b"cat"), {2: "undecodable"}),
    "an empty member": (member_of(11, "npy", b""), {11: "undecodable"}),
    "an array of another shape": (member_of(0, "npy", npy(np.arange(4))), {0: "wrong_shape"}),
    "a sample that is too large": (sample(7, lambda found: [*found, ("000019.txt", bytes(5000))]), {7: "too_large"}),
    "two kinds in one shard": (both(flip(100), cut(10 * SIZE)), {0: "checksum", 10: "truncated", 11: "truncated"}),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    write_set(tmp_path, [SAMPLES] * SHARDS)
    return tmp_path


def data_of(folder: Path, workers: int = 0, **options):
    return shard_data(
        f"{folder}/*.tar", window=WINDOW, max_sample_bytes=4096, num_workers=workers, prefetch=1, **options
    )


def stream() -> Mix:
    return Mix([Order(np.array([SAMPLES] * SHARDS), ORDER["seed"], "shards", ORDER["lanes"], WINDOW)], [1])


def expected(bad: set[tuple[int, int]], numbers: range) -> list[int]:
    """The samples that take the places of numbers, by walking through the replacements."""
    order, labels = stream(), []
    places = order(numbers)
    for number, *place in zip(numbers, places.shard.tolist(), places.sample.tolist(), strict=True):
        place, attempt = tuple(place), 0
        while place in bad:
            place, attempt = order.instead(number, attempt)[1:], attempt + 1
        labels.append(place[0] * SAMPLES + place[1])
    return labels


@pytest.mark.parametrize("name", MATRIX)
def test_damage_is_replaced_and_counted_alike_in_every_layout(folder, name):
    """Each damaged sample is reported when its turn comes, once an epoch, and not again where it would have replaced
    another one: a share of the samples is what damage_budget is about."""
    do, kinds = MATRIX[name]
    do(folder)
    labels = expected({(1, i) for i in kinds}, range(BATCH * len(STEPS)))
    messages = []
    for world, micro_batches, workers in LAYOUTS:
        got = whole(data_of(folder, workers), BATCH, STEPS, world, micro_batches, **ORDER)
        assert got.labels.ravel().tolist() == labels
        assert got.rows.reshape(-1, 3).tolist() == [row(n).tolist() for n in labels]
        assert (got.samples @ [SAMPLES, 1] == got.labels).all()
        reported = Counter((f.kind, Path(f.shard).name, f.sample) for f in got.found)
        assert reported == {(kind, TAR, i): 2 for i, kind in kinds.items()}
        messages.append([f.message for f in got.found])
    assert messages.count(messages[0]) == len(LAYOUTS)
    assert set(labels).isdisjoint(SAMPLES + i for i in kinds)


def longer(folder):
    with (folder / TAR).open("ab") as file:
        file.write(bytes(512))


def resize(suffix: str, by: int):
    def damage(folder):
        path = folder / f"{TAR}{suffix}"
        path.write_bytes((path.read_bytes() + bytes(8))[: path.stat().st_size + by])

    return damage


LARGER = b"".join(member(*m) for n in range(60, 65) for m in [*members_of(n), (f"{n:06d}.txt", bytes(700))]) + END
MISTAKES = {
    "another shard of its size": lambda folder: shutil.copy(folder / "x-002.tar", folder / TAR),
    "a shard that was made again with fewer": write(shard_bytes(range(60, 66))),
    "a shard of fewer and larger samples": write(LARGER),
    "a longer shard": longer,
    "a shard that was made again with more": write(shard_bytes(range(90, 110))),
    "no offsets": lambda folder: os.unlink(folder / f"{TAR}.idx"),
    "no checksums": lambda folder: os.unlink(folder / f"{TAR}.crc"),
    "offsets of one sample less": resize(".idx", -8),
    "offsets of one sample more": resize(".idx", 8),
    "offsets cut within one": resize(".idx", -3),
    "checksums of one sample less": resize(".crc", -4),
    "checksums cut within one": resize(".crc", -1),
    "a bit of the offsets": sidecar(".idx", 8 * 6),
    "a bit of the checksums": sidecar(".crc", 4 * 6),
}
WRITTEN_AGAIN = [name for name in MISTAKES if "shard" in name]


@pytest.mark.parametrize("name", MISTAKES)
def test_an_index_that_does_not_fit_is_an_error_in_every_layout_and_no_damage(folder, name):
    MISTAKES[name](folder)
    places = stream()
    for world, rank, workers in [(1, 0, 0), (4, 1, 0), (4, 3, 0), (1, 0, 1)]:
        layout = Layout(BATCH, world, rank)
        touched = [1 in places(layout.numbers(item)).shard for item in range(5)]
        pieces = list(data_of(folder, workers).loader(layout, 5, 4, 0, 5))
        assert ["error" in piece for piece in pieces] == touched[: [*touched, True].index(True) + 1]  # which is the end
        for piece in pieces:
            assert "error" not in piece or (TAR in piece["error"] and "diffusion-trainer index" in piece["error"])
            assert not piece["damage"]


@pytest.mark.parametrize("name", MISTAKES)
def test_the_command_that_the_error_names_makes_an_index_that_fits(folder, name, capsys):
    before = data_of(folder)
    MISTAKES[name](folder)
    message = next(p["error"] for p in before.loader(Layout(BATCH), 5, 4, 0, 5) if "error" in p)
    (command,) = re.findall(r"diffusion-trainer index ('[^']+'(?: \w+=\w+)*)", message)
    if name == "a longer shard":
        write(shard_bytes(range(90, 110)))(folder)  # what was joined to it has to go first
    assert make_index(shlex.split(command)) == 0, capsys.readouterr()
    after = data_of(folder)
    assert not whole(after, BATCH, STEPS, **ORDER).found
    assert (after.fingerprint == before.fingerprint) == (name not in WRITTEN_AGAIN)


@pytest.mark.parametrize("workers", [0, 1])
def test_where_all_is_damaged_it_ends_with_a_list(folder, workers):
    for path in folder.glob("*.tar"):
        cut(0, path.name)(folder)
    pieces = list(data_of(folder, workers).loader(Layout(4), 5, 4, 0, 3))
    assert [set(piece) for piece in pieces] == [{"error", "passing", "damage"}]
    assert [f.kind for f in pieces[0]["damage"]] == ["truncated"] * (MAX_ATTEMPTS + 1)
    assert pieces[0]["error"].endswith(pieces[0]["damage"][-1].message)
    assert f"{MAX_ATTEMPTS} samples in a row are damaged" in pieces[0]["error"]
    assert pieces[0]["error"].count("truncated: sample") == 8
    with pytest.raises(UserError, match=r"x-000\.tar, sample 0 \(truncated\)"):
        data_of(folder).first(1)


def test_one_good_shard_is_enough(folder):
    """Four of five shards are gone, and windows are shorter than a shard: every place is filled from what is left."""
    for k in (0, 1, 3, 4):
        os.unlink(folder / f"x-{k:03d}.tar")
    got = whole(data_of(folder), BATCH, range(5), **ORDER)
    assert {n // SAMPLES for n in got.labels.ravel().tolist()} == {2}


@dataclass
class Ill(LocalStore):
    """One shard's storage does not answer."""

    def read(self, shard, offset, into):
        if shard.url.endswith(TAR):
            raise PassingError(f"{shard.url} does not answer")
        super().read(shard, offset, into)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_storage_that_does_not_answer_is_never_papered_over(folder, workers):
    places = stream()
    *whole, last = data_of(folder, workers, store=Ill()).loader(Layout(BATCH), 5, 4, 0, 5)
    assert not any("error" in piece or piece["damage"] for piece in whole)
    assert len(whole) == [1 in places(range(BATCH * k, BATCH * (k + 1))).shard for k in range(5)].index(True)
    assert last["error"].endswith("does not answer")
    assert last["passing"]


def test_kinds_have_names_of_their_own():
    kinds = [kind.kind for kind in Damage.__subclasses__()]
    assert len({*kinds, Damage.kind}) == len(kinds) + 1
