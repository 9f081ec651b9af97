"""Procedural pictures of shapes as WebDataset shards, in any number and size: the set for tests of scale.

    python data/shapes.py --out shards/shapes --count 50000 --size 64

Picture i is a function of (seed, i): one of ten shapes in one of eight colours, at one of nine places, small, medium or
large, turned by any angle, on one of four backgrounds, all drawn independently and uniformly. Members: jpg or png (or
latent.npy, see --format), cls (the number of the shape), json (all factors) and txt (a caption). The same versions of
NumPy and Pillow write the same bytes.
"""

import io
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b

import numpy as np
from PIL import Image

from diffusion_trainer.conventions import UserError, cores
from diffusion_trainer.streaming.recipes import Job, Recipe, Skip
from diffusion_trainer.streaming.writing import arguments, positive, script, write

VERSION = 1  # of the pictures; raise it when they change

COLOURS = {
    "red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (250, 220, 50), "green": (50, 160, 70),
    "cyan": (60, 200, 220), "blue": (50, 80, 210), "purple": (140, 60, 180), "pink": (250, 130, 180),
}  # fmt: skip
BACKGROUNDS = {"white": (245, 245, 245), "grey": (128, 128, 128), "black": (15, 15, 15), "brown": (100, 65, 40)}
SIZES = {"small": (0.11, 0.125), "medium": (0.15, 0.165), "large": (0.195, 0.21)}  # radius / side of the picture
COLUMNS, ROWS = ("left", "", "right"), ("top", "", "bottom")
CENTRES = (0.25, 0.5, 0.75)  # of columns and rows, / side; each shape is up to JITTER beside
JITTER = 0.04
LATENT_STRIDE = 8


# Signed distances to an outline within the unit circle, negative inside; x points right and y up.
# Square roots and sums alone: these are rounded the same on every machine.
def disc(x: np.ndarray, y: np.ndarray, x_0: float = 0.0, y_0: float = 0.0, radius: float = 1.0) -> np.ndarray:
    return np.sqrt((x - x_0) ** 2 + (y - y_0) ** 2) - radius


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(disc(x, y, radius=0.76)) - 0.24


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(disc(x, y), -disc(x, y, x_0=0.45, radius=0.8))


def half_disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(disc(x, y, y_0=-0.38, radius=0.92), -0.38 - y)


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner, and a disc on each of its upper sides."""
    x, y, corner = np.abs(x), y + 0.1, 0.75
    square = (x + np.abs(y) - corner) * math.sqrt(0.5)
    return np.minimum(square, disc(x, y, corner / 2, corner / 2, corner * math.sqrt(0.5)))


@dataclass(frozen=True)
class Polygon:
    """Corners in counter-clockwise order."""

    corners: tuple[tuple[float, float], ...]

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        a_x, a_y = np.array(self.corners).T[:, :, None, None]
        e_x, e_y = np.roll(a_x, -1, 0) - a_x, np.roll(a_y, -1, 0) - a_y
        x, y = x - a_x, y - a_y  # (edges, H, W), from the first corner of each edge
        along = np.clip((x * e_x + y * e_y) / (e_x**2 + e_y**2), 0, 1)
        distance = np.sqrt(((x - along * e_x) ** 2 + (y - along * e_y) ** 2).min(0))
        left = e_x * y > e_y * x
        winding = ((y >= 0) & (y < e_y) & left).sum(0) - ((y < 0) & (y >= e_y) & ~left).sum(0)
        return np.where(winding, -distance, distance)


def on_circle(*radii_and_degrees: tuple[float, float]) -> Polygon:
    return Polygon(tuple((r * math.cos(math.radians(d)), r * math.sin(math.radians(d))) for r, d in radii_and_degrees))


CROSS = ((0.94, 0.33), (0.33, 0.33), (0.33, 0.94))  # a quarter of it
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # the order is that of the classes
    "circle": disc,
    "ring": ring,
    "crescent": crescent,
    "half disc": half_disc,
    "heart": heart,
    "triangle": on_circle(*((1, 90 + 120 * k) for k in range(3))),
    "square": on_circle(*((1, 45 + 90 * k) for k in range(4))),
    "star": on_circle(*((0.42 if k % 2 else 1, 90 + 36 * k) for k in range(10))),
    "cross": Polygon(
        (*CROSS, *((-y, x) for x, y in CROSS), *((-x, -y) for x, y in CROSS), *((y, -x) for x, y in CROSS))
    ),
    "arrow": Polygon(((0, 1), (-0.75, 0.2), (-0.28, 0.2), (-0.28, -0.95), (0.28, -0.95), (0.28, 0.2), (0.75, 0.2))),
}


@dataclass(frozen=True)
class Factors:
    """Of one picture: names, and the numbers behind them, lengths in units of its side."""

    shape: str
    colour: str
    background: str
    size: str
    position: str
    radius: float
    x: float  # of the centre, from the left
    y: float  # from the top
    rotation: float  # degrees, counter-clockwise

    @classmethod
    def of(cls, seed: int, i: int) -> "Factors":
        key = repr((seed, "shapes", i)).encode()
        draws = iter(struct.unpack("<16I", blake2b(key, digest_size=64).digest()))

        def choice(options):
            return tuple(options)[next(draws) * len(options) >> 32]

        def between(low: float, high: float) -> float:
            return round(low + (high - low) * next(draws) / 2**32, 6)

        shape, colour, background, size = choice(SHAPES), choice(COLOURS), choice(BACKGROUNDS), choice(SIZES)
        column, row = choice((0, 1, 2)), choice((0, 1, 2))
        position = " ".join(filter(None, (ROWS[row], COLUMNS[column]))) or "centre"
        x, y = (between(CENTRES[place] - JITTER, CENTRES[place] + JITTER) for place in (column, row))
        return cls(shape, colour, background, size, position, between(*SIZES[size]), x, y, between(0, 360))

    @property
    def caption(self) -> str:
        where = "in the centre" if self.position == "centre" else f"at the {self.position}"
        return f"a {self.size} {self.colour} {self.shape} {where} on a {self.background} background"


def draw(factors: Factors, side: int) -> np.ndarray:
    """(side, side, 3) uint8, anti-aliased: a pixel is covered as far as the outline is from its middle."""
    radius, x_0, y_0 = (side * length for length in (factors.radius, factors.x, factors.y))
    picture = np.empty((side, side, 3), np.uint8)
    picture[:] = back = np.array(BACKGROUNDS[factors.background], np.uint8)
    rows, columns = (slice(max(0, int(c - radius - 1)), int(c + radius + 2)) for c in (y_0, x_0))
    u = (np.arange(side)[None, columns] + 0.5 - x_0) / radius
    v = (y_0 - np.arange(side)[rows, None] - 0.5) / radius
    cos, sin = math.cos(math.radians(factors.rotation)), math.sin(math.radians(factors.rotation))
    distance = SHAPES[factors.shape](cos * u + sin * v, cos * v - sin * u)
    cover = np.clip(0.5 - distance * radius, 0, 1)[..., None]
    picture[rows, columns] = np.rint(back + cover * (np.array(COLOURS[factors.colour]) - back.astype(float)))
    return picture


def jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="jpeg", quality=90)
    return file.getvalue()


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="png", compress_level=1)
    return file.getvalue()


def latent(picture: np.ndarray) -> bytes:
    """(4, side/8, side/8) float16: red, green and blue in [-1, 1] averaged over blocks, and their deviation."""
    mean, square = (blocks(values) for values in (picture, np.square(picture, dtype=np.uint16)))
    deviation = np.sqrt(square - mean**2).mean(0, keepdims=True)
    file = io.BytesIO()
    np.save(file, np.concatenate([mean / 127.5 - 1, deviation / 127.5]).astype(np.float16))
    return file.getvalue()


def blocks(values: np.ndarray) -> np.ndarray:
    """(H, W, 3) integers -> (3, H/8, W/8), means of blocks of 8x8."""
    h, w, s = len(values) // LATENT_STRIDE, values.shape[1] // LATENT_STRIDE, LATENT_STRIDE
    rows = values.reshape(h, s, w * s * 3).sum(1, dtype=np.uint32)
    return rows.reshape(h, w, s, 3).sum(2).transpose(2, 0, 1) / s**2


FORMATS: Mapping[str, Callable[[np.ndarray], bytes]] = {"jpg": jpeg, "png": png, "latent.npy": latent}


@dataclass(frozen=True)
class Shapes(Recipe):
    count: int
    size: int
    samples_per_shard: int
    seed: int
    format: str

    @property
    def settings(self) -> dict:
        return {"recipe": "shapes", "version": VERSION, **asdict(self), "classes": list(SHAPES)}

    @property
    def num_shards(self) -> int:
        return math.ceil(self.count / self.samples_per_shard)

    def samples(self, k: int, skip: Skip) -> Iterator[dict]:
        first = k * self.samples_per_shard
        return map(self.sample, range(first, min(first + self.samples_per_shard, self.count)))

    def sample(self, i: int) -> dict:
        factors = Factors.of(self.seed, i)
        return {
            "__key__": f"{i:09d}",
            self.format: FORMATS[self.format](draw(factors, self.size)),
            "cls": str(list(SHAPES).index(factors.shape)).encode(),
            "json": json.dumps(asdict(factors)).encode(),
            "txt": factors.caption.encode(),
        }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], samples_per_shard=10_000)
    parser.add_argument("--count", type=positive, default=50_000, help="pictures")
    parser.add_argument("--size", type=positive, default=64, help="side of a picture in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other pictures, to hold out for example")
    parser.add_argument(
        "--format", choices=FORMATS, default="jpg",
        help="of the picture; latent.npy: (4, size/8, size/8) float16, block means instead of real latents",
    )  # fmt: skip
    parser.add_argument("--processes", type=positive, default=cores(), help="that draw at the same time")
    a = parser.parse_args()
    if a.size < 16 or (a.format == "latent.npy" and a.size % LATENT_STRIDE):
        raise UserError(f"--size {a.size}: at least 16 pixels, and for latents a multiple of {LATENT_STRIDE}")
    write(Job(Shapes(a.count, a.size, a.samples_per_shard, a.seed, a.format), a.out, a.name), a.processes)


if __name__ == "__main__":
    sys.exit(script(main))
