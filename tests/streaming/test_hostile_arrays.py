"""Arrays that mean harm are damage: no code runs, no memory is taken, no other error is raised."""

import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from streaming.members import LABEL, SHAPE, decoded, npy, npz, numbers

from diffusion_trainer.streaming.arrays import Array, Json, Label, Latent, Text
from diffusion_trainer.streaming.damage import Damage, Refused, TooLarge, Undecodable, WrongShape


@pytest.mark.parametrize("shape", [(0, 10**17, 10**17), (1,) * 65, (10**18,)])
def test_headers_cannot_ask_for_what_numpy_refuses(shape):
    header = repr({"descr": "<f2", "fortran_order": False, "shape": shape}).encode().replace(b"}", b", }\n")
    numbers = bytes(2 * np.prod(shape, dtype=object) % 1000)
    with pytest.raises((WrongShape, Undecodable)):
        decoded(Latent(4, 5, 6), b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + numbers)


def test_headers_are_read_not_evaluated():
    header = b"{'descr': '<f2', 'fortran_order': False, 'shape': (print('!'),), }\n"
    with pytest.raises(Undecodable, match="header is damaged"):
        decoded(Latent(4, 5, 6), b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    long = b"\x93NUMPY\2\0" + struct.pack("<I", 1 << 20) + b" " * (1 << 20)
    with pytest.raises(Undecodable, match="header of 1048588 bytes"):
        decoded(Latent(4, 5, 6), long)


class Exploit:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_run(tmp_path):
    trace = tmp_path / "trace"
    array = np.full(SHAPE, None, object)
    array[0, 0, 0] = Exploit(trace)
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    for field, data in [
        (Latent(4, 5, 6), file.getvalue()),
        (Latent(4, 5, 6, extension="npz", member="x"), npz(x=array)),
    ]:
        with pytest.raises(Refused, match="Python objects"):
            decoded(field, data)
    structured = file.getvalue().replace(b"'|O'", b"[('a', '|O')]")
    for field in (
        Latent(4, 5, 6),
        Latent(4, 5, 6, extension="npz", member="x"),
        Label(),
        Label("json", "label"),
        Json(),
    ):
        for data in (pickle.dumps(Exploit(trace)), pickle.dumps(Exploit(trace), 0), structured):
            with pytest.raises(Damage):
                decoded(field, data)
    assert not trace.exists()
    np.load(file.__class__(file.getvalue()), allow_pickle=True)
    assert trace.exists(), "the exploit does not work, so the test shows nothing"


@pytest.mark.parametrize("extension", ["pkl", "pt", "pth", "latent.pt", "x.pickle", "a.pyd", "m.joblib", "PKL"])
def test_extensions_of_pickles_are_refused(extension):
    for make in (
        lambda: Latent(4, 5, 6, extension=extension),
        lambda: Array((3,), extension=extension),
        lambda: Label(extension),
        lambda: Text(extension),
        lambda: Json(extension),
    ):
        with pytest.raises(ValueError, match="run the code in it"):
            make()


def bomb(**changes: int) -> bytes:
    """An npz of 100 MB in some hundred bytes; changes: fields of its directory's entry that lie."""
    data = bytearray(npz(True, x=np.zeros(100_000_000, np.uint8)))
    entry = data.rindex(b"PK\1\2")
    for offset, value in changes.values():
        data[entry + offset : entry + offset + 4] = struct.pack("<I", value)
    return bytes(data)


def test_bombs_are_not_inflated(monkeypatch):
    field, inflated = Array((100,), "uint8", "npz", "x"), []
    make = zlib.decompressobj

    class Counting:
        def __init__(self, *arguments):
            self.inner = make(*arguments)

        def decompress(self, *arguments):
            inflated.append(self.inner.decompress(*arguments))
            return inflated[-1]

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    with pytest.raises(TooLarge, match="100000128 bytes"):
        decoded(field, bomb())
    assert not inflated
    with pytest.raises(Undecodable):
        decoded(field, bomb(size=(24, 200)))
    assert 0 < sum(map(len, inflated)) < 100_000


def test_other_compressions_and_encryption_are_damage():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", npy(numbers()))
    field = Latent(4, 5, 6, extension="npz", member="x")
    with pytest.raises(Undecodable, match="method 14"):
        decoded(field, file.getvalue())
    data = bytearray(npz(x=numbers()))
    data[data.rindex(b"PK\1\2") + 8] |= 1
    data[6] |= 1
    with pytest.raises(Undecodable, match="encrypted"):
        decoded(field, bytes(data))


FUZZED = {
    "npy": (Latent(4, 5, 6), npy(numbers())),
    "npz": (Latent(4, 5, 6, extension="npz", member="x"), npz(x=numbers(), y=numbers())),
    "npz deflated": (Latent(4, 5, 6, extension="npz", member="x"), npz(True, x=numbers(), y=numbers())),
    "cls": (Label(), b"123"),
    "json label": (Label("json", "label"), LABEL),
    "json": (Json(), LABEL),
    "txt": (Text(), "aäöü€🐻".encode()),
}


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_bytes_raise_damage_and_nothing_else(name):
    (field, data), rng, found = FUZZED[name], np.random.default_rng(zlib.crc32(name.encode())), 0
    for attempt in range(1000):
        changed = bytearray(data)
        for at in rng.integers(len(data) if attempt % 2 else min(len(data), 140), size=rng.integers(1, 5)):
            changed[at] ^= 1 << rng.integers(8)
        try:
            decoded(field, bytes(changed[: rng.integers(len(data))] if attempt % 4 == 0 else changed))
        except Damage:
            found += 1
    assert found > 100
