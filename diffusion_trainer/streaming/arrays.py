"""Fields of numbers and text: latents, embeddings, labels, captions, metadata."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffusion_trainer.streaming.damage import MissingField, TooLarge, Undecodable, WrongShape
from diffusion_trainer.streaming.decoding import undecodable
from diffusion_trainer.streaming.fields import Field
from diffusion_trainer.streaming.npy import npy, npz

REFUSED = ("pyd", "pkl", "pickle", "pth", "pt", "joblib")
BFLOAT16 = (np.dtype("V2"), np.dtype("<u2"), np.dtype("<i2"))  # how libraries write it in npy, which has no name for it
EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
MAX_DIGITS = 18  # of a label: they fit int64


def check_extension(extension: str) -> None:
    """ValueError for one that no member has, or whose readers run code."""
    if extension.rpartition(".")[2].lower() in REFUSED:
        raise ValueError(
            f"extension {extension!r} is refused: to read a pickle is to run the code in it; write npy, npz or json"
        )
    if not extension or extension != extension.lower() or extension.startswith("."):
        raise ValueError(f"an extension is lower case and has no dot before it, e.g. 'latent.npy', not {extension!r}")


class Numbers(Field):
    """An array from an npy, or from the `member` of an npz, in exactly its shape and dtype.

    dtype: of the numbers in the shards, any integer or float that numpy has, or bfloat16 (in npy as V2 or 16-bit
    integers). Numbers that are not finite are damage: one would make a NaN of every parameter.
    """

    dtype: str  # a name in the configuration; then that of the buffer
    extension: str
    member: str | None
    presented: torch.dtype | None  # what the bits of the buffer mean, if not what they are

    def __post_init__(self):
        check_extension(self.extension)
        name = "bfloat16" if self.dtype == "bfloat16" else _numeric(self.dtype).name
        dtype = np.dtype(np.int16 if name == "bfloat16" else name)
        if min(self.stored, default=1) < 1:
            raise ValueError(f"all extents must be positive, not {self.stored}")
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "presented", torch.bfloat16 if name == "bfloat16" else None)
        object.__setattr__(self, "_limits", _limits(name, dtype.itemsize))

    @property
    def extensions(self):
        return (self.extension,)

    @property
    @abstractmethod
    def stored(self): ...

    def decode(self, data, out, draws):
        if self.member is not None:
            data = npz(data, self.member, out.nbytes)
        array = npy(data)
        if array.dtype != out.dtype or array.shape != out.shape:
            array = self._as_configured(array, out)
        out[...] = array

    def damaged(self, rows):
        if self._limits is None or not self._beyond(rows):
            return {}
        bad = (row for row in range(len(rows)) if self._beyond(rows[row]))
        return {row: Undecodable("it holds numbers that are not finite (NaN or infinity)") for row in bad}

    def _beyond(self, numbers: np.ndarray) -> bool:
        # argmax of the bits as integers takes 0.06 us for 4096 float16 in a batch, isfinite four.
        signed, unsigned, positive, negative = self._limits
        bits = numbers.ravel()
        a, b = bits.view(signed), bits.view(unsigned)
        return a.item(a.argmax()) >= positive or b.item(b.argmax()) >= negative

    def _as_configured(self, array: np.ndarray, out: np.ndarray) -> np.ndarray:
        if self.presented is not None and array.dtype in BFLOAT16 and array.shape == out.shape:
            return array.view(out.dtype)
        wanted = "bfloat16" if self.presented else out.dtype
        raise WrongShape(f"it is {array.dtype} {array.shape}, the configuration says {wanted} {out.shape}")

    def present(self, batch: Tensor) -> Tensor:
        return batch if self.presented is None else batch.view(self.presented)


def _numeric(dtype: str) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype {dtype!r} is unknown; use e.g. float16, bfloat16, float32 or int64") from error
    if found.kind not in "biuf" or found.itemsize > 8:
        raise ValueError(f"dtype {dtype!r} is not one of integers or floats")
    return found


def _limits(name: str, itemsize: int) -> tuple | None:
    """Views whose largest element tells infinities and NaNs, positive and negative, and from where on it does."""
    if name not in EXPONENT:
        return None
    sign = 1 << (8 * itemsize - 1)
    return np.dtype(f"i{itemsize}"), np.dtype(f"u{itemsize}"), EXPONENT[name], EXPONENT[name] | sign


@dataclass(frozen=True)
class Latent(Numbers):
    """(channels, height, width) from an autoencoder; height and width, those of buckets too, are the latent's own."""

    channels: int
    height: int
    width: int
    dtype: str = "float16"
    extension: str = "latent.npy"
    member: str | None = None
    presented: torch.dtype | None = field(init=False, default=None)

    @property
    def stored(self):
        return self.channels, self.height, self.width

    def shaped(self, height, width):
        return self.channels, height, width


@dataclass(frozen=True)
class Array(Numbers):
    """Of any fixed shape, e.g. (tokens, width) of a text encoder."""

    shape: Sequence[int]
    dtype: str = "float16"
    extension: str = "npy"
    member: str | None = None
    presented: torch.dtype | None = field(init=False, default=None)

    @property
    def stored(self):
        return tuple(self.shape)


@dataclass(frozen=True)
class Label(Field):
    """A class, () int64, not negative: decimal digits, or with `key` the integer of that name in a JSON object."""

    extension: str = "cls"
    key: str | None = None

    stored: ClassVar = ()
    dtype: ClassVar = np.dtype(np.int64)

    def __post_init__(self):
        check_extension(self.extension)

    @property
    def extensions(self):
        return (self.extension,)

    def decode(self, data, out, draws):
        if self.key is not None:
            out[...] = _member(data, self.key)
            return
        digits = bytes(data).strip()
        if not digits.isdigit() or len(digits) > MAX_DIGITS:
            raise undecodable("a label is written in decimal digits", data)
        out[...] = int(digits)


def _member(data: memoryview, key: str) -> int:
    found = _json(data)
    if not isinstance(found, dict) or key not in found:
        raise MissingField(f"its JSON has no {key!r}: {bytes(data[:80])!r}")
    value = found[key]
    if type(value) is not int or not 0 <= value < 10**MAX_DIGITS:  # to Python, true is an integer
        raise Undecodable(f"{key!r} is no class in its JSON: {bytes(data[:80])!r}")
    return value


@dataclass(frozen=True)
class Text(Field):
    """str of at most max_bytes in UTF-8."""

    extension: str = "txt"
    max_bytes: int = 1 << 16

    stored: ClassVar = None
    dtype: ClassVar = None

    def __post_init__(self):
        check_extension(self.extension)

    @property
    def extensions(self):
        return (self.extension,)

    def decode(self, data, out, draws):
        _check_size(data, self.max_bytes)
        return _text(data)


@dataclass(frozen=True)
class Json(Field):
    """What a JSON text of at most max_bytes says (RFC 8259: UTF-8, no NaN)."""

    extension: str = "json"
    max_bytes: int = 1 << 20

    stored: ClassVar = None
    dtype: ClassVar = None

    def __post_init__(self):
        check_extension(self.extension)

    @property
    def extensions(self):
        return (self.extension,)

    def decode(self, data, out, draws):
        _check_size(data, self.max_bytes)
        return _json(data)


def _check_size(data: memoryview, max_bytes: int) -> None:
    if len(data) > max_bytes:
        raise TooLarge(f"it has {len(data)} bytes, more than max_bytes={max_bytes}")


def _text(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise undecodable(f"it is not UTF-8 ({error.reason} at byte {error.start})", data) from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)


def _json(data: memoryview) -> Any:
    try:
        return _JSON.decode(_text(data))
    except (ValueError, RecursionError) as error:  # the latter: thousands of brackets
        raise undecodable(f"it is no JSON ({error})", data) from error
