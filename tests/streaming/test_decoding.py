"""Bytes of images to pixels: Pillow's, or damage, and nothing else."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image as Pillow
from PIL import ImageCms
from streaming.members import encoded

from diffusion_trainer.streaming.damage import Damage, TooLarge, Undecodable
from diffusion_trainer.streaming.decoding import MODES, ByPillow, Jpeg, image_size, picture_of
from diffusion_trainer.streaming.fields import SampleDraws
from diffusion_trainer.streaming.images import CenterCrop, Image

DRAWS = SampleDraws(0, 0)
HEIGHT, WIDTH = 37, 50


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 with the 1/f spectrum of photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    grey, *colours = (
        np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency, s=(height, width)) for _ in range(4)
    )
    pixels = grey[..., None] + 0.3 * np.stack(colours, -1)
    return np.clip(128 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)


def files() -> dict[str, bytes]:
    rgb = Pillow.fromarray(smooth(HEIGHT, WIDTH))
    grey, palette, rgba = rgb.convert("L"), rgb.quantize(32), rgb.copy()
    rgba.putalpha(grey)
    sixteen = Pillow.fromarray((np.asarray(grey).astype(np.uint16) << 8) + 77)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg 4:4:4": encoded(rgb, "JPEG", subsampling=0),
        "jpeg progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg grey": encoded(grey, "JPEG"),
        "jpeg RGB": encoded(rgb, "JPEG", keep_rgb=True),
        "jpeg CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "png": encoded(rgb, "PNG"),
        "png grey": encoded(grey, "PNG"),
        "png 1 bit": encoded(rgb.convert("1"), "PNG"),
        "png palette": encoded(palette, "PNG"),
        "png palette with alpha": encoded(palette, "PNG", transparency=bytes(range(32))),
        "png alpha": encoded(rgba, "PNG"),
        "png grey alpha": encoded(rgba.convert("LA"), "PNG"),
        "png transparent colour": encoded(rgb, "PNG", transparency=(1, 2, 3)),
        "png 16 bits": encoded(sixteen, "PNG"),
        "png profile": encoded(rgb, "PNG", icc_profile=profile, dpi=(72, 72)),
        "webp": encoded(rgb, "WEBP"),
        "webp lossless": encoded(rgb, "WEBP", lossless=True),
        "webp alpha": encoded(rgba, "WEBP"),
        "webp animated": encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(180)]),
    }


FILES = files()
OFF_BY = {"jpeg CMYK": 2}  # levels from Pillow's pixels


def pixels_of(data: bytes, channels: int) -> np.ndarray:
    out = np.empty((HEIGHT, WIDTH, channels), np.uint8)
    Image(channels, HEIGHT, WIDTH).decode(memoryview(data), out, DRAWS)
    return out


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", MODES)
@pytest.mark.filterwarnings("error")
def test_pixels_are_those_of_pillow(name, channels):
    got = pixels_of(FILES[name], channels).squeeze()
    picture = Pillow.open(io.BytesIO(FILES[name]))
    picture.draft(MODES[channels], None)  # the luminance of a JPEG as it is, from before its colours were clipped
    picture.load()
    picture.info.pop("transparency", None)
    if name == "png 16 bits":
        picture = Pillow.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    expected = np.asarray(picture.convert(MODES[channels]))
    assert np.abs(got.astype(int) - expected).max() <= OFF_BY.get(name, 0)


def test_sixteen_bits_become_the_upper_eight():
    grey = np.asarray(Pillow.fromarray(smooth(HEIGHT, WIDTH)).convert("L"))
    assert (pixels_of(FILES["png 16 bits"], 1)[..., 0] == grey).all()


def test_the_bytes_say_the_format_and_the_names_do_not():
    for name, data in FILES.items():
        picture = picture_of(memoryview(data))
        assert isinstance(picture, Jpeg if name.startswith("jpeg") else ByPillow)
    with pytest.raises(Undecodable, match=r"no JPEG, PNG or WebP.*GIF8"):
        picture_of(memoryview(encoded(Pillow.new("L", (3, 3)), "GIF")))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (255, 2), (256, 257)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}])
def test_the_header_says_the_size(size, format, options):
    data = encoded(Pillow.new("RGB", size[::-1], (9, 90, 200)), format, **options)
    assert image_size(data) == size
    assert image_size(data[: len(data) // 8]) in (size, (0, 0))
    assert image_size(b"nothing") == (0, 0)


def test_the_orientation_of_cameras_is_ignored():
    picture = Pillow.fromarray(smooth(HEIGHT, WIDTH))
    exif = Pillow.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = encoded(picture, "JPEG", exif=exif)
    assert (pixels_of(turned, 3) == pixels_of(encoded(picture, "JPEG"), 3)).all()


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_damage(name):
    data = FILES[name]
    for size in range(0, len(data), 1 if len(data) < 2000 else 3):
        with pytest.raises(Undecodable):
            pixels_of(data[:size], 3)
    with pytest.raises(Undecodable):
        pixels_of(data[:-1], 3)


def with_checksums(png: bytes) -> bytes:
    """A PNG whose chunks claim to be whole."""
    data, at = bytearray(png), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 <= len(data):
            data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    if rng.random() < 0.3:
        return data[: rng.integers(len(data))]
    flipped = bytearray(data)
    reach = len(data) if rng.random() < 0.5 else min(len(data), 200)  # headers are where the cases are
    for at in rng.integers(reach, size=rng.integers(1, 9)):
        flipped[at] ^= 1 << rng.integers(8)
    return with_checksums(flipped) if data[:4] == b"\x89PNG" and rng.random() < 0.7 else bytes(flipped)


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_raise_damage_and_nothing_else(name):
    rng, found = np.random.default_rng(zlib.crc32(name.encode())), 0
    small = np.empty((5, 7, 3), np.uint8)
    for attempt in range(500):
        data = damaged(FILES[name], rng)
        try:
            if attempt % 2:
                pixels_of(data, 3)
            else:
                Image(3, 5, 7, CenterCrop()).decode(memoryview(data), small, DRAWS)
        except Damage:
            found += 1
    assert found > 100


def silent_in_pillow(data: bytes) -> bool:
    try:
        np.asarray(Pillow.open(io.BytesIO(data)))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", ["jpeg", "jpeg grey", "jpeg CMYK"])
def test_a_jpeg_that_ends_early_is_damaged_where_pillow_paints_it_grey(name):
    data, silent = FILES[name], 0
    for at in range(len(data) // 2, len(data) - 20, 7):
        cut = data[:at] + b"\xff\xd9" + data[at + 2 :]
        silent += silent_in_pillow(cut)
        with pytest.raises(Undecodable):
            pixels_of(cut, 3)
    assert silent > 50


def test_flipped_bits_that_libjpeg_notices_are_damage():
    """Pillow decodes nearly all of them silently. What leaves a valid code is for the sample's checksum to find."""
    data, rng, found = FILES["jpeg"], np.random.default_rng(0), 0
    for at in rng.integers(len(data) // 2, len(data) - 2, size=300):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.integers(8)
        if silent_in_pillow(flipped):
            try:
                pixels_of(bytes(flipped), 3)
            except Undecodable:
                found += 1
    assert found > 20


def test_a_png_whose_checksums_are_wrong_is_damaged():
    data = bytearray(FILES["png"])
    data[-16] ^= 1  # the checksum of its pixels, which Pillow does not look at
    np.asarray(Pillow.open(io.BytesIO(data)))
    with pytest.raises(Undecodable, match="checksum of the PNG's b'IDAT'"):
        pixels_of(bytes(data), 3)


def with_chunk(name: bytes, body: bytes, before: bytes = b"IDAT") -> bytes:
    """The PNG with one more."""
    png, chunk = FILES["png"], struct.pack(">I", len(body)) + name + body
    at = png.index(before) - 4
    return png[:at] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + png[at:]


def strange_pngs() -> dict[str, bytes]:
    """Their checksums are right."""
    pixels = FILES["png"].index(b"IDAT") - 4
    half = FILES["png"][pixels + 8 : pixels + 1000]
    split = with_chunk(b"IDAT", half)
    odd = split.index(b"IDAT", pixels + 1000) - 4
    inner = split[:odd] + with_chunk(b"\xf9\xb0\x8a\xde", b"")[pixels : pixels + 12] + split[odd:]
    return {
        "text of three million bytes": with_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 3_000_000)),
        "chunk too short": with_chunk(b"pHYs", b"a"),
        "chunk amid the pixels": inner,
        "second header": with_chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT - 9, 8, 2, 0, 0, 0)),
    }


@pytest.mark.parametrize("name", strange_pngs())
def test_what_pillow_says_of_strange_pngs_is_damage(name):
    with pytest.raises(Undecodable):
        pixels_of(strange_pngs()[name], 3)


def test_images_without_pixels_are_damage():
    jpeg, webp = bytearray(FILES["jpeg"]), bytearray(FILES["webp"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 7] = b"\0\0"
    webp[28:30] = b"\0\0"
    flat = bytearray(FILES["png"])
    flat[20:24] = b"\0\0\0\0"
    for data in (jpeg, webp, with_checksums(flat)):
        with pytest.raises(Undecodable, match=r"no pixels|header"):
            picture_of(memoryview(data))


def bombs() -> dict[str, bytes]:
    """Small files that say they are 16383 x 16383: most of a gigabyte."""
    side = 16383
    jpeg, png, webp = bytearray(FILES["jpeg"]), bytearray(FILES["png"]), bytearray(FILES["webp lossless"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    png[16:24] = struct.pack(">II", side, side)
    bits = int.from_bytes(webp[21:25], "little") >> 28 << 28 | (side - 1) << 14 | (side - 1)
    webp[21:25] = struct.pack("<I", bits)
    canvas = bytearray(FILES["webp alpha"])
    canvas[24:30] = 2 * (side - 1).to_bytes(3, "little")
    return {"jpeg": jpeg, "png": with_checksums(png), "webp lossless": webp, "webp extended": canvas}


@pytest.mark.parametrize("name", bombs())
@pytest.mark.filterwarnings("error")
def test_bombs_are_not_decoded(name, monkeypatch):
    monkeypatch.setattr(Pillow, "open", None)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    with pytest.raises(TooLarge, match=r"16383 x 16383 pixels; max_pixels is 67108864"):
        pixels_of(bytes(bombs()[name]), 3)


@pytest.mark.parametrize("size", [(64, 64), (203, 161), (513, 96)])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_jpeg_decoded_smaller_is_the_average_of_its_pixels(size, factor):
    """Scaling in the transform's domain and by averaging blocks agree for smooth images."""
    ramp = np.add.outer(np.arange(size[0]), np.arange(size[1])) * 250 / sum(size)
    data = memoryview(encoded(Pillow.fromarray(ramp.astype(np.uint8)), "JPEG", quality=100))
    for enough in (factor, factor * 1.9):
        small, by = picture_of(data).pixels(1, enough)
        assert by == factor
        assert small.shape == (-(-size[0] // factor), -(-size[1] // factor), 1)
    whole = np.asarray(Pillow.open(io.BytesIO(data))).astype(float)
    inner = whole[: size[0] // factor * factor, : size[1] // factor * factor]
    blocks = inner.reshape(size[0] // factor, factor, -1, factor).mean((1, 3))
    assert np.abs(small[: blocks.shape[0], : blocks.shape[1], 0] - blocks).max() <= 1.5


def test_whatever_pillow_raises_of_bad_bytes_is_damage():
    """Of a colour profile that is empty, behind the pixels, it raises IndexError."""
    plain = encoded(Pillow.new("L", (16, 16)), "PNG")
    chunk = b"iCCP"
    damaged = plain[:-12] + bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4, "big") + plain[-12:]
    with pytest.raises(Undecodable, match="cannot be decoded as PNG \\(IndexError: "):
        picture_of(memoryview(damaged)).pixels(1)
