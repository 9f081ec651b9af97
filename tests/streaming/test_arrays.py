"""Numbers and text: what numpy and json read, or damage, and never a program."""

import io
import json
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_trainer.streaming.arrays import Array, Json, Label, Latent, Text
from diffusion_trainer.streaming.damage import Damage, MissingField, Refused, TooLarge, Undecodable, WrongShape
from diffusion_trainer.streaming.fields import Field, SampleDraws

DTYPES = ["float16", "float32", "float64", "int8", "uint8", "int32", "int64", "uint16", "bool"]
SHAPE = (4, 5, 6)
LABEL = b'{"label": 3, "caption": "a \\u00e4", "tags": [1, 2.5, {"b": null}]}'


def numbers(dtype: str = "float16", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def npz(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def decoded(field: Field, data: bytes, shape: tuple[int, ...] | None = None):
    """As a batch's row and its presentation, or the object."""
    if field.stored is None:
        return field.decode(memoryview(data), None, SampleDraws(0, 0))
    batch = np.zeros((3, *(shape or field.stored)), field.dtype)
    field.decode(memoryview(data), batch[1, ...], SampleDraws(0, 0))
    assert not batch[[0, 2]].any()
    for row, damage in field.damaged(batch).items():
        assert row == 1
        raise damage
    return field.present(torch.from_numpy(batch))[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(1,), (7,), (4, 5, 6), ()])
def test_arrays_are_those_of_numpy(dtype, version, order, shape):
    array = np.asarray(numbers(dtype, shape), order=order)
    data, field = npy(array, version), Array(shape, dtype)
    assert (np.load(io.BytesIO(data)) == array).all()
    got = decoded(field, data)
    assert (got.numpy() == array).all()
    assert got.numpy().dtype == array.dtype
    assert (decoded(Array(shape, dtype, "npz", "x"), npz(x=array, y=array[..., None])).numpy() == array).all()
    assert (decoded(Array(shape, dtype, "npz", "x"), npz(True, x=array)).numpy() == array).all()


def test_a_latent_is_one_and_obeys_the_shape_of_its_bucket():
    field = Latent(4, 5, 6)
    assert field.extensions == ("latent.npy",)
    assert (field.stored, field.shaped(3, 9), field.dtype) == (SHAPE, (4, 3, 9), np.dtype("float16"))
    assert (decoded(field, npy(numbers())).numpy() == numbers()).all()
    other = numbers(shape=(4, 3, 9))
    assert (decoded(field, npy(other), (4, 3, 9)).numpy() == other).all()


@pytest.mark.parametrize("written_as", ["V2", "uint16", "int16"])
def test_bfloat16_keeps_its_bits(written_as):
    values = torch.randn(SHAPE, dtype=torch.bfloat16)
    data = npy(values.view(torch.int16).numpy().view(written_as))
    got = decoded(Latent(4, 5, 6, dtype="bfloat16"), data)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, values)
    with pytest.raises(WrongShape, match=r"float16.*says bfloat16"):
        decoded(Latent(4, 5, 6, dtype="bfloat16"), npy(numbers()))
    with pytest.raises(WrongShape):
        decoded(Latent(4, 5, 6, dtype="int16"), npy(numbers().view("V2")))


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_numbers_that_are_not_finite_are_damage(value, dtype):
    tensor = torch.full(SHAPE, -1.5, dtype=getattr(torch, dtype))
    largest = torch.finfo(tensor.dtype).max
    tensor[0, 0, 0], tensor[1, 2, 3] = largest, -largest

    def data() -> bytes:
        return npy(tensor.view(torch.int16).numpy() if dtype == "bfloat16" else tensor.numpy())

    assert torch.equal(decoded(Latent(4, 5, 6, dtype=dtype), data()), tensor)
    tensor[3, 4, 5] = value
    with pytest.raises(Undecodable, match="not finite"):
        decoded(Latent(4, 5, 6, dtype=dtype), data())


@pytest.mark.parametrize(
    "array",
    [
        numbers("float32"),
        numbers().astype(">f2"),
        numbers(shape=(5, 4, 6)),
        numbers(shape=(120,)),
        numbers(shape=(0, 5, 6)),
        np.zeros(SHAPE, "U1"),
        np.zeros(SHAPE, "M8[s]"),
        np.zeros(SHAPE, [("a", "f2")]),
        np.zeros(SHAPE, "c8"),
    ],
)
def test_another_shape_or_dtype_is_refused_with_both(array):
    """Nothing is converted silently: what is configured is what lies in the shards."""
    with pytest.raises(WrongShape):
        decoded(Latent(4, 5, 6), npy(array))
    with pytest.raises(WrongShape, match=r"float32 \(4, 5, 6\), the configuration says float16 \(4, 5, 6\)"):
        decoded(Latent(4, 5, 6), npy(numbers("float32")))


def test_lengths_must_be_as_the_header_says():
    data = npy(numbers())
    for wrong in (data[:-1], data + b"\0", data[:128], data[:127], data[:11], data[:5], b""):
        with pytest.raises(Undecodable):
            decoded(Latent(4, 5, 6), wrong)


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Label(".cls"), "no dot before"),
        (lambda: Label("CLS"), "lower case"),
        (lambda: Label(""), "lower case"),
        (lambda: Label(num_classes=0), "num_classes must be positive"),
        (lambda: Latent(4, 0, 6), "positive"),
        (lambda: Array((3, -1)), "positive"),
        (lambda: Array((3,), "float17"), "float17.*unknown"),
        (lambda: Array((3,), "object"), "not one of integers or floats"),
        (lambda: Array((3,), "complex64"), "not one of integers or floats"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_members_of_an_npz():
    data, field = npz(x=numbers(), y=numbers("float32")), Array(SHAPE, "float16", "npz", "z")
    with pytest.raises(MissingField, match=r"no z, only x\.npy, y\.npy"):
        decoded(field, data)
    with pytest.raises(Undecodable, match="is an npz: set `member`"):
        decoded(Array(SHAPE), data)
    with pytest.raises(Undecodable, match="no npz"):
        decoded(field, npy(numbers()))


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


@pytest.mark.parametrize("text", ["0", "7", "999", "0012", "5\n", "999999999999999999"])
def test_labels_are_decimal_digits(text):
    got = decoded(Label(), text.encode())
    assert (got.shape, got.dtype, got.item()) == ((), torch.int64, int(text))


@pytest.mark.parametrize("text", ["", "-1", "+1", "1_0", "0x1", "1.0", "1 2", "true", "٣", "1" * 19, "9" * 5000, "\0"])
def test_other_labels_are_damage_and_shown(text):
    with pytest.raises(Undecodable, match=r"decimal digits; it has .* begins with b'"):
        decoded(Label(), text.encode())


def test_labels_in_json():
    field = Label("json", "label")
    assert decoded(field, LABEL).item() == 3
    with pytest.raises(MissingField, match="no 'label'"):
        decoded(field, b'{"class": 3}')
    for value in (b"true", b"-1", b"1.0", b'"3"', b"null", b"[3]", b"1000000000000000000", b"9" * 5000):
        with pytest.raises(Undecodable):
            decoded(field, b'{"label": ' + value + b"}")
    for text in (b"[3]", b"3"):
        with pytest.raises(MissingField):
            decoded(field, text)


@pytest.mark.parametrize(
    ("field", "text"),
    [(Label(num_classes=10), b"%d"), (Label("json", "label", num_classes=10), b'{"label": %d}')],
    ids=["cls", "json"],
)
def test_a_label_that_is_not_below_the_number_of_classes_is_damage(field, text):
    for label in (0, 9):
        assert decoded(field, text % label).item() == label
    for label in (10, 11, 10**17):
        with pytest.raises(Undecodable, match=rf"label {label} is out of range: there are 10 classes, 0 to 9"):
            decoded(field, text % label)


def test_text_and_json_are_python_objects():
    assert decoded(Text(), "ein Bär 🐻".encode()) == "ein Bär 🐻"
    assert decoded(Json(), LABEL) == json.loads(LABEL)
    assert (Text().stored, Json().stored, Text("caption").extensions) == (None, None, ("caption",))


@pytest.mark.parametrize("data", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", "ä".encode("latin-1")])
def test_text_that_is_no_utf8_is_damage(data):
    with pytest.raises(Undecodable, match=r"not UTF-8.*begins with b'\\x"):
        decoded(Text(), data)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1,]", b"NaN", b"-Infinity", b"\xef\xbb\xbf1", b"[" * 100_000, '"a"'.encode("utf-16"), b'"\xff"'],
)
def test_what_is_no_json_is_damage(data):
    with pytest.raises(Undecodable):
        decoded(Json(), data)
    with pytest.raises(Undecodable):
        decoded(Label("json", "label"), data)


def test_long_texts_are_damage():
    for field in (Text(max_bytes=5), Json(max_bytes=5)):
        assert decoded(field, b"12345") in ("12345", 12345)
        with pytest.raises(TooLarge, match="6 bytes, more than max_bytes=5"):
            decoded(field, b"123456")


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
