"""Images: bytes to pixels, cropped, resized and flipped."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image as Pillow
from torch import Tensor

from diffusion_trainer.streaming.damage import WrongShape
from diffusion_trainer.streaming.decoding import IMAGES, MODES, Picture, picture_of
from diffusion_trainer.streaming.fields import Field, SampleDraws

MARGIN = 2  # a JPEG is decoded to no less than so many times the target, the rest is left to the better filter
Size = tuple[int, int]  # height and width


class Box(NamedTuple):
    """A rectangle of a picture, in its pixels."""

    top: float
    left: float
    height: float
    width: float


class Geometry(ABC):
    """Which part of a picture fills the target."""

    @abstractmethod
    def box(self, size: Size, target: Size, draws: SampleDraws) -> Box:
        """It is resized unless it has the target's size, in which case its corner is rounded down to a pixel."""


@dataclass(frozen=True)
class Exact(Geometry):
    """The whole picture, which must have the target's size."""

    def box(self, size, target, draws):
        if size != target:
            raise WrongShape(
                f"the image has {size[0]} x {size[1]} pixels (height x width), the configuration says {target[0]} x "
                f"{target[1]}; set the field's height and width, or its geometry to CenterCrop or RandomCrop"
            )
        return Box(0, 0, *target)


@dataclass(frozen=True)
class CenterCrop(Geometry):
    """The largest part of the target's aspect in the middle: for a square, the shorter side becomes the target's."""

    def box(self, size, target, draws):
        height, width = _largest(size, target)
        return Box((size[0] - height) / 2, (size[1] - width) / 2, height, width)


@dataclass(frozen=True)
class RandomCrop(Geometry):
    """A part of the target's aspect anywhere; its sides are between min_fraction and 1 of the largest such part's.

    0.8 is what Dhariwal and Nichol (2021, arXiv:2105.05233) train with; 1 varies only the place, along the longer side.
    """

    min_fraction: float = 1.0

    def __post_init__(self):
        if not 0 < self.min_fraction <= 1:
            raise ValueError(f"min_fraction is a share of the largest crop's side, in (0, 1], not {self.min_fraction}")

    def box(self, size, target, draws):
        height, width = _largest(size, target)
        if self.min_fraction < 1:
            fraction = self.min_fraction + (1 - self.min_fraction) * draws.uniform("crop_size")
            height, width = height * fraction, width * fraction
        top = int(draws.uniform("crop_y") * (int(size[0] - height) + 1))
        left = int(draws.uniform("crop_x") * (int(size[1] - width) + 1))
        return Box(top, left, height, width)


def _largest(size: Size, target: Size) -> tuple[float, float]:
    """Height and width of the largest rectangle of the target's aspect."""
    return min(size[0], size[1] * target[0] / target[1]), min(size[1], size[0] * target[1] / target[0])


@dataclass(frozen=True)
class Image(Field):
    """(channels, height, width) uint8 from a JPEG, PNG or WebP.

    channels: 1 is the luminance, 3 is RGB; alpha is dropped. flip: probability of a mirror image (left and right).
    max_pixels: an image that says it has more is damaged, and not decoded. Resizing, downwards and upwards, is
    Pillow's bicubic filter, as wide as the reduction needs (no aliases: Parmar et al., arXiv:2104.11222). The
    orientation that cameras write into EXIF is ignored: what makes the shards turns the pixels. The augmentations
    depend on the sample's number alone.
    """

    channels: int
    height: int
    width: int
    geometry: Geometry = field(default_factory=Exact)
    flip: float = 0.0
    max_pixels: int = 1 << 26

    def __post_init__(self):
        if self.channels not in MODES:
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {self.channels}")
        if min(self.height, self.width, self.max_pixels) < 1:
            raise ValueError("height, width and max_pixels must be positive")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability, not {self.flip}; 0.5 mirrors every other image")

    @property
    def extensions(self):
        return IMAGES

    @property
    def stored(self):
        return self.height, self.width, self.channels

    def shaped(self, height, width):
        return height, width, self.channels

    @property
    def dtype(self):
        return np.dtype(np.uint8)

    def decode(self, data, out, draws):
        picture, target = picture_of(data, self.max_pixels), out.shape[:2]
        box = self.geometry.box(picture.size, target, draws)
        mirrored = self.flip > 0 and draws.uniform("flip") < self.flip
        if picture.size == target == box[2:] and not mirrored:
            picture.into(out)
        else:
            _copy(_part(picture, self.channels, box, target), out, mirrored)

    def present(self, batch: Tensor) -> Tensor:
        return batch.permute(0, 3, 1, 2)


def _part(picture: Picture, channels: int, box: Box, target: Size) -> np.ndarray:
    """The box as (*target, channels)."""
    if box[2:] == target:
        pixels, _ = picture.pixels(channels)
        top, left = int(box.top), int(box.left)
        return pixels[top : top + target[0], left : left + target[1]]
    enough = min(box.height / target[0], box.width / target[1]) / MARGIN
    pixels, factor = picture.pixels(channels, enough)
    height, width = pixels.shape[:2]
    top, left, bottom, right = (x / factor for x in (box.top, box.left, box.top + box.height, box.left + box.width))
    source = Pillow.fromarray(pixels if channels > 1 else pixels[..., 0])
    corners = left, top, min(right, width), min(bottom, height)  # rounding may have put them outside
    resized = source.resize((target[1], target[0]), Pillow.Resampling.BICUBIC, corners)
    return np.asarray(resized).reshape(*target, channels)


def _copy(pixels: np.ndarray, out: np.ndarray, mirrored: bool) -> None:
    if mirrored:
        for c in range(out.shape[2]):  # three times as fast as all channels at once
            out[:, ::-1, c] = pixels[..., c]
    else:
        out[...] = pixels
