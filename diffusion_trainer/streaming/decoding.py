"""Bytes to pixels: a closed list of formats, told apart by their bytes, none of which can run code.

Damage is all that these functions raise for bad data; the libraries' own exceptions are named where they are called.
"""

import io
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np
import simplejpeg
from PIL import Image as Pillow

from diffusion_trainer.streaming.damage import Damage, TooLarge, Undecodable

IMAGES = ("jpg", "jpeg", "png", "webp")  # extensions; the bytes decide which of the formats it is
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name
MAX_SCANS = 100  # of a JPEG: ten are usual, and each costs what its pixels do
_SCAN = re.compile(b"\xff\xda")  # how one begins, and nothing else but in comments and thumbnails
_START_OF_SCAN = 0xDA
_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables and comments, which may come before frame and scan
_SEQUENTIAL = {0xC0, 0xC1}  # frames
PNG = b"\x89PNG\r\n\x1a\n"
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's names of what `picture_of` knows


def undecodable(what: str, data: memoryview) -> Undecodable:
    return Undecodable(f"{what}; it has {len(data)} bytes and begins with {bytes(data[:16])!r}")


@contextmanager
def opened(data: bytes | memoryview, formats: Sequence[str]) -> Iterator[Pillow.Image]:
    """As Pillow opens it, its pixels not loaded yet. Formats that are not named are not looked for: some of Pillow's
    start other programs. What Pillow finds wrong in the body of the `with`, too, is Damage."""
    try:
        with Pillow.open(io.BytesIO(data), formats=formats) as picture:
            yield picture
    except Pillow.DecompressionBombError as error:
        raise TooLarge(str(error)) from error
    except Pillow.UnidentifiedImageError as error:  # whose message has an address in memory
        raise undecodable(f"it is no {', '.join(formats)}", memoryview(data)) from error
    except (Damage, MemoryError):
        raise
    except Exception as error:  # of somebody else's parsers, which meet bad bytes with any: IndexError, TypeError, ...
        what = f"it cannot be decoded as {', '.join(formats)} ({type(error).__name__}: {error})"
        raise undecodable(what, memoryview(data)) from error


def eight_bits(picture: Pillow.Image) -> Pillow.Image:
    """The upper 8 of 16 bits, where Pillow's convert would clip at 255. Undecodable if the range is not known."""
    if picture.mode in ("I", "F"):
        raise Undecodable(f"its pixels have 32 bits (Pillow's mode {picture.mode}), and it does not say what is white")
    if not picture.mode.startswith("I;16"):
        return picture
    upper = Pillow.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if "exif" in picture.info:  # which way is up
        upper.info["exif"] = picture.info["exif"]
    return upper


@dataclass(frozen=True)
class Picture(ABC):
    """An image whose header has been read, and nothing else."""

    data: memoryview
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def check(self) -> None:  # noqa: B027 (some formats have nothing that shows)
        """Damage, or what would take too long, as far as it shows without decoding."""

    @abstractmethod
    def pixels(self, channels: int, enough: float = 1.0) -> tuple[np.ndarray, int]:
        """(ceil(H/f), ceil(W/f), channels) uint8, and f: 1, 2, 4 or 8, at most `enough`. Alpha is dropped."""

    def into(self, out: np.ndarray) -> None:
        """All pixels; out: (H, W, channels)."""
        out[...], _ = self.pixels(out.shape[2])


class Jpeg(Picture):
    """Decoded strictly: what libjpeg would only warn of, and paint grey, is damage.

    Flipped bits that leave valid codes show in no JPEG; samples have checksums against them. CMYK may differ from
    Pillow's by one level.
    """

    @classmethod
    def of(cls, data: memoryview) -> "Jpeg":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise undecodable(f"its JPEG header cannot be read ({error})", data) from error
        return cls(data, height, width)

    def pixels(self, channels, enough=1.0):
        factor = next(f for f in (8, 4, 2, 1) if f <= max(enough, 1))
        return self._decode(channels, -(-self.height // factor), -(-self.width // factor)), factor

    def into(self, out):
        if out.flags.c_contiguous:
            self._decode(out.shape[2], self.height, self.width, out)
        else:
            super().into(out)

    def _decode(self, channels: int, height: int, width: int, buffer: np.ndarray | None = None) -> np.ndarray:
        self.check()
        colours = "GRAY" if channels == 1 else "RGB"
        try:
            return simplejpeg.decode_jpeg(self.data, colours, min_height=height, min_width=width, buffer=buffer)
        except ValueError as error:
            raise undecodable(f"its JPEG data are damaged ({error})", self.data) from error

    def check(self):
        """A scan of ten bytes may pass over all pixels: what is missing is taken for zeros, and said afterwards."""
        data, at, components = self.data, 2, None
        while at + 10 <= len(data) and data[at] == 0xFF:
            kind = data[at + 1]
            if kind == _START_OF_SCAN and data[at + 4] == components:
                return  # has all of a sequential frame: libjpeg reads no other one
            if kind in _SEQUENTIAL:
                components = data[at + 9]
            elif kind not in _SEGMENTS:
                break
            at += 2 + (data[at + 2] << 8 | data[at + 3])
        if any(islice(_SCAN.finditer(data[at:]), MAX_SCANS, None)):
            raise undecodable(f"the JPEG has more than {MAX_SCANS} scans", data)


class ByPillow(Picture):
    """Palettes become colours, 16 bits 8 (the upper ones), the first frame of an animation the image."""

    format: ClassVar[str]  # Pillow's name

    def pixels(self, channels, enough=1.0):
        with opened(self.data, (self.format,)) as picture:
            if picture.size != (self.width, self.height):  # a second header, after the one that was looked at
                raise undecodable("it has headers of two sizes", self.data)
            picture.load()
            picture.info.pop("transparency", None)  # alpha is dropped anyhow; Pillow would warn of it
            pixels = np.asarray(eight_bits(picture).convert(MODES[channels]))
        return pixels.reshape(self.height, self.width, channels), 1


class Png(ByPillow):
    format = "PNG"

    @classmethod
    def of(cls, data: memoryview) -> "Png":
        if bytes(data[8:16]) != b"\0\0\0\x0dIHDR" or len(data) < 24:
            raise undecodable("its PNG header is damaged", data)
        width, height = struct.unpack(">II", data[16:24])
        return cls(data, height, width)

    def pixels(self, channels, enough=1.0):
        self.check()
        return super().pixels(channels)

    def check(self):
        """The checksums of all chunks, which Pillow does not look at, and that the last one is there."""
        at, name = 8, b""
        while name != b"IEND":
            (length,) = struct.unpack(">I", bytes(self.data[at : at + 4]).ljust(4, b"\xff"))
            end = at + 8 + length
            if end + 4 > len(self.data):
                raise undecodable("the PNG is truncated", self.data)
            name = bytes(self.data[at + 4 : at + 8])
            if zlib.crc32(self.data[at + 4 : end]) != int.from_bytes(self.data[end : end + 4], "big"):
                raise undecodable(f"the checksum of the PNG's {name!r} is wrong", self.data)
            at = end + 4


class WebP(ByPillow):
    format = "WEBP"

    @classmethod
    def of(cls, data: memoryview) -> "WebP":
        head = bytes(data[:30]).ljust(30, b"\0")
        if int.from_bytes(head[4:8], "little") + 8 > len(data):
            raise undecodable("the WebP is truncated", data)
        width, height = _webp_size(head)
        if not width:
            raise undecodable("its WebP header is damaged", data)
        return cls(data, height, width)


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height; zeros for a header that is none (RFC 9649, sections 2.5 to 2.7)."""
    if head[12:16] == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if head[12:16] == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if head[12:16] == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return 0, 0


def picture_of(data: memoryview, max_pixels: int | None = None) -> Picture:
    """Of a JPEG, PNG or WebP: as its first bytes say, whatever its name. Only the header is read.

    TooLarge if that says that there are more pixels than max_pixels.
    """
    magic = bytes(data[:12])
    if magic[:3] == b"\xff\xd8\xff":
        picture = Jpeg.of(data)
    elif magic[:8] == PNG:
        picture = Png.of(data)
    elif magic[:4] == b"RIFF" and magic[8:] == b"WEBP":
        picture = WebP.of(data)
    else:
        raise undecodable("it is no JPEG, PNG or WebP", data)
    if not (picture.height and picture.width):
        raise undecodable("the image has no pixels", data)
    if max_pixels is not None and picture.height * picture.width > max_pixels:
        raise TooLarge(f"the image says it has {picture.height} x {picture.width} pixels; max_pixels is {max_pixels}")
    return picture


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Height and width as the image's header says; (0, 0) for what is no image."""
    try:
        return picture_of(memoryview(data)).size
    except Damage:
        return 0, 0
