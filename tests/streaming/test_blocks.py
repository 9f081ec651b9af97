"""Samples that are read and decoded many at once are what they are one by one, whatever lies among them."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from streaming import making
from streaming.making import END, member, npy, theorem

from diffusion_trainer.streaming import samples as samples_module
from diffusion_trainer.streaming.arrays import Array, Label, Text
from diffusion_trainer.streaming.columns import Block, Column
from diffusion_trainer.streaming.cutter import Cutter
from diffusion_trainer.streaming.damage import Damage, MissingField
from diffusion_trainer.streaming.fields import Decoder, Draws
from diffusion_trainer.streaming.samples import Samples
from diffusion_trainer.streaming.stores import LocalStore

SHAPE = (2, 3)
FIELDS = {"image": Array(SHAPE), "label": Label(num_classes=1000), "caption": Text(), "drawn": making.Text()}


def values(n: int, dtype=np.float16, order: str = "C") -> np.ndarray:
    return np.asarray(np.arange(6).reshape(SHAPE) + n, dtype, order=order)


def plain(n: int, array: bytes | None = None, label: str | None = None, name: str = "") -> bytes:
    key = name or f"{n:06d}"
    array = npy(values(n)) if array is None else array
    text = f"sample {n}".encode()
    label = str(n) if label is None else label
    return member(f"{key}.npy", array) + member(f"{key}.cls", label.encode()) + member(f"{key}.txt", text)


# What a sample may be like: of the same size as its neighbours, or not, or not to be used.
KINDS: dict[str, Callable[[int], bytes]] = {
    "plain": plain,
    "fortran": lambda n: plain(n, npy(values(n, order="F"))),
    "other order": lambda n: member(f"{n}.cls", b"%d" % n) + member(f"{n}.npy", npy(values(n))) + member(f"{n}.txt"),
    "larger": lambda n: plain(n) + member(f"{n:06d}.json", bytes(700)),
    "many": lambda n: plain(n, label="0" * 5 + str(n)),
    "long key": lambda n: plain(n, name=f"{n:0200d}"[-90:]),
    "nan": lambda n: plain(n, npy(values(n) * np.float16("nan"))),
    "float32": lambda n: plain(n, npy(values(n, np.float32))),
    "other shape": lambda n: plain(n, npy(values(n).T)),
    "cut array": lambda n: plain(n, npy(values(n))[:-1]),
    "no array": lambda n: member(f"{n}.cls", b"%d" % n) + member(f"{n}.txt", b"sample"),
    "no label": lambda n: plain(n, label="x"),
    "label too large": lambda n: plain(n, label="1000"),
    "no text": lambda n: plain(n)[:-512] + b"\xff" * 8 + bytes(504),
}
WRONG = {
    "nan": "undecodable", "float32": "wrong_shape", "other shape": "wrong_shape", "cut array": "undecodable",
    "no array": "missing_field", "no label": "undecodable", "label too large": "undecodable", "no text": "undecodable",
}  # fmt: skip


def opened(folder: str, kinds: list[str]) -> Samples:
    made = b"".join(KINDS[kind](n) for n, kind in enumerate(kinds)) + END
    shard = making.indexed(Path(folder) / "x-000.tar", made)
    return Samples(LocalStore().find(f"{folder}/{shard.url}"), LocalStore(), 1 << 20)


def filled(read: Samples, count: int, at_once: bool):
    """Arrays, objects, and (row, kind of damage) in the order in which they were told; those are read as sample 0."""
    decoder, where, told = Decoder(FIELDS), [(0, i) for i in range(count)], []
    arrays = [np.full(entry.shape, 77, entry.dtype) for entry in decoder.entries(count)]

    def failed(row: int, damage: Damage) -> None:
        told.append((row, damage.kind, str(damage)))
        where[row] = (0, 0)

    blocks = (lambda row: read.block(where[row:])) if at_once else None
    objects = decoder.fill(arrays, Draws(0, range(count)), lambda row: read.read(*where[row]), failed, blocks)
    return [a.tobytes() for a in arrays], objects, sorted(told)


@theorem(150)
@given(st.lists(st.sampled_from(list(KINDS)), max_size=40), st.sampled_from([1, 4096, 10_000, 1 << 18]))
@example([*KINDS, *KINDS], 1 << 18)
@example([*KINDS, *KINDS], 1)
@example(["plain"] * 40, 1 << 18)
def test_blocks_of_any_size_are_the_samples_one_by_one(kinds, block_bytes):
    kinds = ["plain", *kinds]
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(samples_module, "BLOCK_BYTES", block_bytes)
        read = opened(folder, kinds)
        found, truth = (filled(read, len(kinds), at_once) for at_once in (True, False))
    assert found == truth
    assert [(row, kind) for row, kind, _ in found[2]] == [(n, WRONG[k]) for n, k in enumerate(kinds) if k in WRONG]


def test_a_sample_with_other_bytes_than_were_indexed_ends_a_block_and_is_told_by_its_own_read(tmp_path):
    read = opened(str(tmp_path), ["plain"] * 9)
    path = tmp_path / "x-000.tar"
    data = bytearray(path.read_bytes())
    data[5 * len(plain(0)) + 600] ^= 1
    path.write_bytes(data)
    assert [len(read.block([(0, i) for i in range(first, 9)])) for first in (0, 5, 6)] == [5, 0, 3]
    _, objects, told = filled(read, 9, at_once=True)
    assert [(row, kind) for row, kind, _ in told] == [(5, "checksum")]
    assert objects["caption"] == [f"sample {n}" for n in (0, 1, 2, 3, 4, 0, 6, 7, 8)]


def test_samples_that_lie_alike_are_decoded_by_one_copy(tmp_path, monkeypatch):
    """Else it would be slow without a word."""
    read = opened(str(tmp_path), ["plain"] * 20)
    monkeypatch.setattr(Array, "decode", None)
    monkeypatch.setattr(Samples, "read", None)
    arrays, _, told = filled(read, 20, at_once=True)
    assert not told
    assert np.array_equal(np.frombuffer(arrays[0], np.float16).reshape(20, *SHAPE), [values(n) for n in range(20)])


def test_a_block_has_as_many_samples_as_fit_and_at_least_one(tmp_path, monkeypatch):
    size = len(plain(0))
    monkeypatch.setattr(samples_module, "BLOCK_BYTES", 3 * size + 100)
    read = opened(str(tmp_path), ["plain"] * 8)
    assert [len(read.block([(0, i) for i in range(first, 8)])) for first in (0, 6)] == [3, 2]
    large = member("k/large.npy", bytes(20 * size)) + b"".join(plain(n) for n in range(8))
    (tmp_path / "large").mkdir()
    shard = making.indexed(tmp_path / "large" / "x-000.tar", large + END)
    read = Samples(LocalStore().find(f"{tmp_path}/large/{shard.url}"), LocalStore(), 1 << 20)
    assert [len(read.block([(0, i) for i in range(first, 9)])) for first in (0, 1)] == [1, 3]  # a larger one but once
    monkeypatch.setattr(samples_module, "BLOCK_BYTES", 1)
    assert len(opened(str(tmp_path), ["plain"] * 8).block([(0, i) for i in range(8)])) == 1


def test_columns_say_where_members_are_and_whether_evenly():
    parts = [memoryview(plain(n)) for n in range(4)]
    memory, size, cut = memoryview(b"".join(parts)), len(parts[0]), Cutter()
    block = Block(memory, [size * n for n in range(4)], [cut.places(part) for part in parts])
    column = block.column(("webp", "npy"))
    assert [bytes(column[row]) for row in range(4)] == [npy(values(n)) for n in range(4)]
    assert column.strides() == (size, len(npy(values(0))))
    with pytest.raises(MissingField, match=r"no \.webp, only \.cls, \.npy, \.txt"):
        block.column(("webp",))
    assert Column(memory, [0, 8, 17], [4, 12, 21]).strides() is None
    assert Column(memory, [0, 8, 16], [4, 12, 21]).strides() is None
    assert Column(memory, [3], [9]).strides() == (1, 6)
