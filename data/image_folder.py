"""A folder of images as WebDataset shards.

    python data/image_folder.py my/photos --out shards/photos

The class of an image is its sub-folder: my/photos/cat/1.jpg has that of `cat`, and so has my/photos/cat/old/2.jpg.
The names are sorted and numbered, and stand in <out>/classes.json; one that is there already is obeyed, so that a
second set (--name heldout) has the same numbers. --no-classes takes the images as they lie, without classes.

JPEG, PNG and WebP files are copied as they are, after a look whether they can be decoded; BMP, GIF and TIFF become
PNG; no other format is read, whatever the file's name. The order is shuffled, because shards of one class each would
make poor batches. Members: jpg, png or webp, cls, and json (the path). What is broken is left out and listed; with
--strict it stops the recipe.
"""

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps

from diffusion_trainer.conventions import UserError, cores
from diffusion_trainer.conventions import plain as visible
from diffusion_trainer.streaming.damage import Damage
from diffusion_trainer.streaming.decoding import FORMATS, eight_bits, opened, picture_of
from diffusion_trainer.streaming.order import permutation
from diffusion_trainer.streaming.recipes import Job, Recipe, Skip, fingerprint, read_json, stamp, write_json
from diffusion_trainer.streaming.writing import arguments, positive, script, write

VERSION = 2  # of the shards; raise it when they change
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # of files that are taken for images
OTHERS = ("BMP", "GIF", "TIFF")  # formats that become PNG
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's format -> extension of a file as it is


def member(data: bytes, max_side: int | None, quality: int) -> tuple[str, bytes]:
    """Extension and bytes of what the shard gets for an image file. Damage for bad bytes."""
    with opened(data, (*FORMATS, *OTHERS)) as image:
        extension = KEPT.get(image.format, "png")
        too_large = max_side is not None and max(image.size) > max_side
        if image.format in KEPT:
            picture = picture_of(memoryview(data))
            picture.check()
            if not too_large:
                picture.pixels(3)  # by training's own decoder: what that calls damage is none here
                return extension, data
        if too_large:
            image = resized(image, max_side)
        image.load()
        return ("jpg", encoded(image, "jpeg", quality)) if extension == "jpg" else ("png", encoded(image, "png"))


def resized(image: Image.Image, max_side: int) -> Image.Image:
    """Upright, filtered by Lanczos, the longer side max_side pixels."""
    image = plain(image)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return ImageOps.exif_transpose(image)


def plain(image: Image.Image) -> Image.Image:
    """In a mode that can be filtered: palettes become colours, 16 bits 8."""
    image = eight_bits(image)
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def encoded(image: Image.Image, kind: str, quality: int = 95) -> bytes:
    file = io.BytesIO()
    image = image.convert("RGB") if kind == "jpeg" and image.mode != "L" else plain(image)
    image.save(file, format=kind, quality=quality)
    return file.getvalue()


def files_below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """But hidden ones. Links are followed, unless they lead back into a folder that they lie in."""
    found = folder.stat()
    here = (found.st_dev, found.st_ino)
    if here in above:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from files_below(path, above | {here})
        else:
            yield path


def listing(root: Path) -> tuple[list[str], int]:
    """Paths of the images below a folder, sorted; how many other files there are. Hidden ones do not count. What has
    an image's name and is no file (a link to nothing, a pipe) is among the others, and said.
    """
    files = [os.path.relpath(path, root) for path in files_below(root)]
    named = sorted(path for path in files if path.lower().endswith(SUFFIXES))
    images = [path for path in named if (root / path).is_file()]
    for path in sorted(set(named) - set(images)):
        print(f"  left out: {visible(printable(path))}: it is no file, or a link to none", file=sys.stderr)
    if not images:
        raise UserError(f"{root}: no file below it is an image ({', '.join(SUFFIXES)}); is it the right folder?")
    return images, len(files) - len(images)


def classes_of(paths: Sequence[str], known: Path) -> list[str]:
    """Names of the classes in the order of their numbers: those of the file, or those of the paths."""
    found = {path.partition("/")[0] for path in paths if "/" in path}
    loose = [path for path in paths if "/" not in path]
    if loose:
        raise UserError(f"{loose[0]} lies in no sub-folder, so it has no class; take all without: --no-classes")
    anew = "remove it, and the sets beside it, to number the classes anew"
    names = read_json(known, list, anew) if known.exists() else sorted(found)
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{known} does not have the names of classes; {anew}")
    if found - set(names):
        raise UserError(f"{known} does not have {min(found - set(names))}; use another --out, or remove that file")
    return names


@dataclass(frozen=True)
class ImageFolder(Recipe):
    root: Path
    paths: tuple[str, ...]  # in the order of the shards
    stamps: tuple[tuple[int, int], ...]  # of these files
    classes: tuple[str, ...] | None
    samples_per_shard: int
    max_side: int | None
    quality: int

    @cached_property
    def settings(self) -> dict:
        return {
            "recipe": "image_folder",
            "version": VERSION,
            "images": len(self.paths),
            "names, sizes and times of files": fingerprint(zip(self.paths, self.stamps, strict=True)),
            "classes": self.classes,
            "samples_per_shard": self.samples_per_shard,
            "max_side": self.max_side,
            "quality": self.quality if self.max_side else None,
        }

    @property
    def num_shards(self) -> int:
        return math.ceil(len(self.paths) / self.samples_per_shard)

    def samples(self, k: int, skip: Skip) -> Iterator[dict]:
        numbers = {name: str(i).encode() for i, name in enumerate(self.classes or ())}
        for i in range(k * self.samples_per_shard, min((k + 1) * self.samples_per_shard, len(self.paths))):
            path = self.paths[i]
            data = (self.root / path).read_bytes()
            try:
                extension, image = member(data, self.max_side, self.quality)
            except Damage as error:
                skip(f"{printable(path)}: {error}")
                continue
            sample = {"__key__": f"{i:09d}", extension: image, "json": json.dumps({"path": printable(path)}).encode()}
            yield sample if self.classes is None else sample | {"cls": numbers[path.partition("/")[0]]}


def printable(path: str) -> str:
    """File names may be any bytes."""
    return os.fsencode(path).decode(errors="replace")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], samples_per_shard=1000)
    parser.add_argument("folder", type=Path, help="of the images")
    parser.add_argument("--classes", action=argparse.BooleanOptionalAction, default=True, help="the sub-folders are")
    parser.add_argument("--max-side", type=positive, help="images with a longer side are made smaller; others stay")
    parser.add_argument("--quality", type=positive, default=95, help="of the JPEGs that were made smaller")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--strict", action="store_true", help="stop at the first image that is broken")
    parser.add_argument("--processes", type=positive, default=cores(), help="that read at the same time")
    a = parser.parse_args()
    if not a.folder.is_dir():
        raise UserError(f"{a.folder} is no folder")
    paths, others = listing(a.folder)
    names = a.out / "classes.json"
    classes = tuple(classes_of(paths, names)) if a.classes else None
    print(f"{len(paths):,} images" + (f", {others:,} other files" if others else ""))
    shuffled = tuple(paths[i] for i in permutation(len(paths), "image_folder", a.seed))
    stamps = tuple(stamp(a.folder / path) for path in shuffled)
    recipe = ImageFolder(a.folder, shuffled, stamps, classes, a.samples_per_shard, a.max_side, a.quality)
    report = write(Job(recipe, a.out, a.name, a.strict), a.processes)
    if classes is not None and report is not None:
        write_json(names, classes)


if __name__ == "__main__":
    sys.exit(script(main))
