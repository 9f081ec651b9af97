"""Cropping, resizing and flipping of images, against what signal theory says."""

import io
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from diffusion_trainer.streaming import images
from diffusion_trainer.streaming.damage import TooLarge, Undecodable, WrongShape
from diffusion_trainer.streaming.fields import SampleDraws
from diffusion_trainer.streaming.images import CenterCrop, Exact, Image, RandomCrop

SIZES = [(64, 64), (63, 64), (64, 63), (97, 61), (61, 97), (200, 33), (20, 33), (9, 9)]
GEOMETRIES = [CenterCrop(), RandomCrop(), RandomCrop(0.5)]


def encoded(pixels: np.ndarray, format: str = "PNG", **options) -> memoryview:
    """(H, W) or (H, W, 3) uint8 as a file."""
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, format, **options)
    return memoryview(file.getvalue())


def decoded(field: Image, data: memoryview, number: int = 0, shape: tuple[int, ...] | None = None) -> np.ndarray:
    out = np.full(shape or field.stored, 77, np.uint8)
    field.decode(data, out, SampleDraws(0, number))
    return out


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def natural(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W) uint8 with the 1/f spectrum of photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    pixels = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency, s=(height, width))
    return np.clip(128 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_an_image_of_the_right_size_is_taken_as_it_is(format):
    pixels = noise(13, 9)
    data = encoded(pixels, format, **({"lossless": True} if format == "WEBP" else {}))
    expected = np.asarray(Pillow.open(io.BytesIO(data)))
    for geometry in [Exact(), *GEOMETRIES[:2]]:
        assert (decoded(Image(3, 13, 9, geometry), data) == expected).all()
        assert (decoded(Image(3, 13, 9, geometry, flip=1.0), data) == expected[:, ::-1]).all()
    assert format == "JPEG" or (expected == pixels).all()


def test_rows_of_any_layout_are_filled():
    data, expected = encoded(noise(8, 6), "JPEG"), decoded(Image(3, 8, 6), encoded(noise(8, 6), "JPEG"))
    for out in (np.zeros((8, 12, 3), np.uint8)[:, ::2], np.zeros((3, 8, 6), np.uint8).transpose(1, 2, 0)):
        Image(3, 8, 6).decode(data, out, SampleDraws(0, 0))
        assert (out == expected).all()


def test_another_size_is_refused_with_both_and_with_what_to_set():
    with pytest.raises(WrongShape, match=r"20 x 30 pixels.*says 32 x 16; set the field's height and width.*CenterCrop"):
        decoded(Image(3, 32, 16), encoded(noise(20, 30)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_constant_stays_constant(size, geometry, format):
    data = encoded(np.full((*size, 3), 128, np.uint8), format)
    for target in [(16, 16), (17, 13), (5, 40)]:
        assert (decoded(Image(3, *target, geometry), data, number=3) == 128).all()


def sampled(size: int, target: int, other: int, other_target: int) -> np.ndarray:
    """Where the centres of the target's pixels lie along an axis, in pixels of the source, for a centre crop."""
    side = min(size, other * target / other_target)
    return (size - side) / 2 + (np.arange(target) + 0.5) * side / target - 0.5


@pytest.mark.parametrize("size", [(512, 512), (511, 300), (301, 512), (40, 33)])
@pytest.mark.parametrize("target", [(32, 32), (31, 48), (64, 17)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_ramp_stays_a_ramp_at_its_place(size, target, format, axis):
    """Every filter whose weights sum to one and are symmetric keeps straight lines, and their position to a pixel."""
    slope = 250 / size[axis]
    line = slope * np.arange(size[axis])
    ramp = np.broadcast_to(line[:, None] if axis == 0 else line[None], size)
    options = {"quality": 100} if format == "JPEG" else {}
    got = decoded(Image(1, *target, CenterCrop()), encoded(np.rint(ramp).astype(np.uint8), format, **options))
    expected = slope * sampled(size[axis], target[axis], size[1 - axis], target[1 - axis])
    profile = np.moveaxis(got[..., 0], axis, 0)[2:-2].astype(float)  # at the edges the filter is cut off
    assert np.abs(profile - expected[2:-2, None]).max() <= 1.5 + (format == "JPEG")


def wave(period: float, size: int = 512) -> np.ndarray:
    return np.broadcast_to(np.rint(128 + 100 * np.sin(2 * np.pi * np.arange(size) / period)), (size, size))


@pytest.mark.parametrize(("format", "leak"), [("PNG", 0.07), ("JPEG", 0.2)])  # blocks of a JPEG are a worse filter
def test_waves_above_the_nyquist_frequency_vanish_and_those_below_stay(format, leak):
    """512 -> 64: waves shorter than 16 pixels cannot be shown. Taking every eighth pixel would show them all."""
    options = {"quality": 100} if format == "JPEG" else {}
    amplitude = {
        period: decoded(Image(1, 64, 64, CenterCrop()), encoded(wave(period).astype(np.uint8), format, **options)).std()
        for period in (5.3, 7.7, 10.3, 64.0)
    }
    full = 100 / np.sqrt(2)
    assert max(amplitude[5.3], amplitude[7.7], amplitude[10.3]) < leak * full
    assert amplitude[64.0] > 0.95 * full
    assert wave(7.7)[::8, ::8].std() > 0.9 * full


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(16, 16), (15, 16), (8, 21)])
def test_a_centre_crop_has_no_side_that_it_prefers(size, target):
    """It commutes with mirrors: no half pixel is lost, whether sizes are odd or even."""
    field, pixels = Image(3, *target, CenterCrop()), noise(*size)
    got = decoded(field, encoded(pixels)).astype(int)
    assert np.abs(decoded(field, encoded(pixels[:, ::-1])) - got[:, ::-1]).max() <= 1
    assert np.abs(decoded(field, encoded(pixels[::-1])) - got[::-1]).max() <= 1


@pytest.mark.parametrize(("size", "top", "left"), [((16, 16), 0, 0), ((16, 19), 0, 1), ((21, 16), 2, 0)])
def test_a_crop_without_resizing_copies_pixels(size, top, left):
    pixels = noise(*size)
    for format in ("PNG", "JPEG"):
        data = encoded(pixels, format)
        whole = np.asarray(Pillow.open(io.BytesIO(data)))
        assert (decoded(Image(3, 16, 16, CenterCrop()), data) == whole[top : top + 16, left : left + 16]).all()


@pytest.mark.parametrize("size", [(16, 21), (21, 16)])
def test_a_random_crop_comes_from_every_place_equally_often(size):
    """As many places as there are, each as often as chance has it (within five sigma)."""
    data = encoded(np.add.outer(np.arange(size[0]), np.arange(size[1])).astype(np.uint8))
    field, draws = Image(1, 16, 16, RandomCrop()), 1200
    places = [int(decoded(field, data, n)[0, 0, 0]) for n in range(draws)]
    counts = np.bincount(places, minlength=6)
    assert len(counts) == 6
    assert np.abs(counts - draws / 6).max() < 5 * np.sqrt(draws / 6)


def test_what_is_drawn_is_drawn_independently():
    """Place along either axis, size and flip: correlations of 1000 samples are within five sigma of none."""
    boxes = [RandomCrop(0.5).box((1000, 1000), (10, 10), SampleDraws(0, n)) for n in range(1000)]
    flips = [SampleDraws(0, n).uniform("flip") for n in range(1000)]
    drawn = [
        [b.top / (1000 - b.height), b.left / (1000 - b.width), b.height, f] for b, f in zip(boxes, flips, strict=True)
    ]
    correlations = np.corrcoef(np.array(drawn).T)
    assert np.abs(correlations - np.eye(4)).max() < 5 / np.sqrt(1000)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fraction", [1.0, 0.8, 0.3])
def test_random_crops_lie_inside_and_keep_the_aspect(size, fraction):
    target, largest = (24, 36), min(size[0], size[1] * 24 / 36)
    boxes = [RandomCrop(fraction).box(size, target, SampleDraws(1, n)) for n in range(300)]
    heights = np.array([b.height for b in boxes])
    assert all(b.top >= 0 and b.top + b.height <= size[0] + 1e-9 for b in boxes)
    assert all(b.left >= 0 and b.left + b.width <= size[1] + 1e-9 for b in boxes)
    assert np.allclose([b.width * 24 for b in boxes], heights * 36)
    assert fraction * largest <= heights.min() + 1e-9
    assert heights.max() <= largest + 1e-9
    assert np.ptp(heights) >= 0.9 * (1 - fraction) * largest


def test_a_share_of_the_images_is_mirrored():
    pixels = noise(2, 2)
    data, field, n = encoded(pixels), Image(3, 2, 2, flip=0.3), 2000
    got = [decoded(field, data, i) for i in range(n)]
    mirrored = sum((g == pixels[:, ::-1]).all() for g in got)
    assert mirrored + sum((g == pixels).all() for g in got) == n
    assert abs(mirrored - 0.3 * n) < 5 * np.sqrt(n * 0.3 * 0.7)


@pytest.mark.parametrize("shape", [(24, 40, 3), (40, 24, 3), (7, 7, 3)])
def test_the_array_says_the_shape_not_the_field(shape):
    field, data = Image(3, 32, 32, CenterCrop()), encoded(natural(200, 100).repeat(3).reshape(200, 100, 3))
    assert (decoded(field, data, shape=shape) == decoded(Image(3, *shape[:2], CenterCrop()), data)).all()
    assert field.shaped(*shape[:2]) == shape


def test_the_batch_is_presented_without_a_copy():
    batch = torch.zeros(4, 8, 6, 3, dtype=torch.uint8)
    shown = Image(3, 8, 6).present(batch)
    assert shown.shape == (4, 3, 8, 6)
    assert shown.data_ptr() == batch.data_ptr()


@pytest.mark.parametrize("target", [(64, 64), (128, 100), (31, 31)])
def test_a_jpeg_that_is_decoded_smaller_gives_nearly_the_same(target, monkeypatch):
    data = encoded(natural(600, 520), "JPEG", quality=90)
    field = Image(1, *target, CenterCrop())
    quick = decoded(field, data).astype(int)
    monkeypatch.setattr(images, "MARGIN", 1000)
    error = quick - decoded(field, data)
    assert error.any(), "it was not decoded smaller"
    assert np.abs(error).max() < 16
    assert error.std() < 2.5
    assert abs(error.mean()) < 0.2


def fingerprint(_: int = 0) -> str:
    """Of the pixels of sixty samples."""
    found = blake2b()
    files = [encoded(natural(90, 70).repeat(3).reshape(90, 70, 3), f) for f in ("PNG", "WEBP", "JPEG")]
    for number in range(60):
        found.update(decoded(Image(3, 32, 32, RandomCrop(0.6), flip=0.5), files[number % 3], number))
    return found.hexdigest()


@pytest.mark.slow
def test_a_sample_has_the_same_pixels_in_every_process():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert list(pool.map(fingerprint, [0])) == [fingerprint()]


def test_too_many_pixels_and_no_pixels():
    with pytest.raises(TooLarge, match="20 x 30 pixels; max_pixels is 599"):
        decoded(Image(3, 8, 8, CenterCrop(), max_pixels=599), encoded(noise(20, 30)))
    assert decoded(Image(3, 8, 8, CenterCrop(), max_pixels=600), encoded(noise(20, 30))).any()
    for data in (b"", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"\x89PNG\r\n\x1a\n", b"GIF89a"):
        with pytest.raises(Undecodable):
            decoded(Image(3, 8, 8), memoryview(data))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Image(2, 8, 8), "1 .grey. or 3"),
        (lambda: Image(3, 0, 8), "positive"),
        (lambda: Image(3, 8, 8, max_pixels=0), "positive"),
        (lambda: Image(3, 8, 8, flip=1.5), "probability"),
        (lambda: RandomCrop(0.0), "min_fraction"),
        (lambda: RandomCrop(1.5), "min_fraction"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
