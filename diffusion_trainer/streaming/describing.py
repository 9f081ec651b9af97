"""What one member of a sample is, decoded as a field of training would decode it: none of it can run code."""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from itertools import islice
from typing import NamedTuple

import numpy as np

from diffusion_trainer.streaming.arrays import Json, Label, Text
from diffusion_trainer.streaming.damage import TooLarge, WrongShape
from diffusion_trainer.streaming.decoding import IMAGES, picture_of, undecodable
from diffusion_trainer.streaming.fields import SampleDraws
from diffusion_trainer.streaming.npy import npy, npz
from diffusion_trainer.streaming.numeric import REFUSED

MAX_PIXELS = 1 << 26
MAX_BYTES = 1 << 26  # of text, or of the arrays of an npz
SHOWN = 100  # characters
MEMBERS = 16  # of an npz that are looked at: each is found by reading the list of all again
NONE = SampleDraws(0, 0)  # nothing here is augmented
LABEL, TEXT, JSON = Label(), Text(max_bytes=MAX_BYTES), Json(max_bytes=MAX_BYTES)


class Description(NamedTuple):
    shape: str  # the same for members of one kind: shape and dtype
    value: str | None = None  # what this one holds, or its beginning
    picture: np.ndarray | None = None  # (H, W, 3) uint8


def describe(extension: str, data: memoryview) -> Description:
    """By the extension's last part. Raises Damage."""
    return KINDS.get(extension.rpartition(".")[2], _other)(data)


def _image(data: memoryview) -> Description:
    picture = picture_of(data)
    if picture.height * picture.width > MAX_PIXELS:
        raise TooLarge(f"the image says it has {picture.height} x {picture.width} pixels")
    pixels, _ = picture.pixels(3)
    colours = "grey" if _is_grey(pixels[::8, ::8]) and _is_grey(pixels) else "colour"
    return Description(f"{picture.height} x {picture.width} {colours} {type(picture).__name__.upper()}", None, pixels)


def _is_grey(pixels: np.ndarray) -> bool:
    return bool((pixels[..., :2] == pixels[..., 2:]).all())


def _array(data: memoryview) -> Description:
    try:
        array = npy(data)
    except WrongShape as unusual:  # it may be whole, but no field takes it
        return Description(str(unusual))
    return Description(f"{array.shape} {array.dtype}")


def _archive(data: memoryview) -> Description:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sizes = {
                i.filename.removesuffix(".npy"): i.file_size for i in archive.infolist() if i.filename.endswith(".npy")
            }
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise undecodable(f"it is no npz ({error})", data) from error
    if sum(sizes.values()) > MAX_BYTES:
        raise TooLarge(f"the arrays of its npz have {sum(sizes.values())} bytes")
    shown = [f"{_short(name)} {_array(npz(data, name, MAX_BYTES)).shape}" for name in islice(sizes, MEMBERS)]
    more = [f"{len(sizes) - MEMBERS} more"] * (len(sizes) > MEMBERS)
    return Description(", ".join([*shown, *more]))


def _label(data: memoryview) -> Description:
    value = np.empty((), np.int64)
    LABEL.decode(data, value, NONE)
    return Description("label", str(value))


def _text(data: memoryview) -> Description:
    return Description("text", _short(TEXT.decode(data, None, NONE)))


def _json(data: memoryview) -> Description:
    value = JSON.decode(data, None, NONE)
    keys = f"keys {', '.join(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
    return Description(_short(keys), _short(json.dumps(value, ensure_ascii=False)))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _code(data: memoryview) -> Description:
    return Description("can run code: never read")


def _other(data: memoryview) -> Description:
    return Description("bytes")


KINDS: Mapping[str, Callable[[memoryview], Description]] = {
    **dict.fromkeys(IMAGES, _image),
    **dict.fromkeys(REFUSED, _code),
    "npy": _array,
    "npz": _archive,
    "cls": _label,
    "txt": _text,
    "json": _json,
}
