"""Arrays out of members: numpy's own numbers, or damage."""

import io

import numpy as np
import pytest
import torch
from streaming.members import DTYPES, SHAPE, decoded, npy, npz, numbers

from diffusion_trainer.streaming.arrays import Array, Label, Latent
from diffusion_trainer.streaming.damage import MissingField, Undecodable, WrongShape


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
