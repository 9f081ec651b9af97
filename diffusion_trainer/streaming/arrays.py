"""Fields of numbers and text: latents, embeddings, labels, captions, metadata."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from diffusion_trainer.streaming.damage import MissingField, TooLarge, Undecodable
from diffusion_trainer.streaming.decoding import undecodable
from diffusion_trainer.streaming.fields import Field
from diffusion_trainer.streaming.numeric import Numbers, check_extension

MAX_DIGITS = 18  # of a label: they fit int64


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
    """A class, () int64, not negative: decimal digits, or with `key` the integer of that name in a JSON object.

    num_classes: a label that is not below it is damage; null: as large as int64 has them.
    """

    extension: str = "cls"
    key: str | None = None
    num_classes: int | None = None

    stored: ClassVar = ()
    dtype: ClassVar = np.dtype(np.int64)

    def __post_init__(self):
        check_extension(self.extension)
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes must be positive, not {self.num_classes}; null for any label")

    @property
    def extensions(self):
        return (self.extension,)

    def decode(self, data, out, draws):
        out[...] = self._label(data)

    def decode_all(self, column, out, draws):
        out[...] = [self._label(column[row]) for row in range(len(column))]
        return [None] * len(column)

    def _label(self, data: memoryview) -> int:
        label = _decimal(data) if self.key is None else _member(data, self.key)
        if self.num_classes is not None and label >= self.num_classes:
            raise Undecodable(
                f"label {label} is out of range: there are {self.num_classes} classes, 0 to {self.num_classes - 1} "
                "(num_classes, that of the conditioning)"
            )
        return label


def _decimal(data: memoryview) -> int:
    digits = bytes(data).strip()
    if not digits.isdigit() or len(digits) > MAX_DIGITS:
        raise undecodable("a label is written in decimal digits", data)
    return int(digits)


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
