"""Parquet files of images with captions as WebDataset shards.

    python data/parquet_captions.py my/part-*.parquet --out shards/captions --image image --caption text

The image column has the bytes of image files, or structs with these in `bytes`, or paths (below --root). Images go
into the shards as data/image_folder.py puts them there: as they are, unless --max-side asks for smaller ones. Rows keep
their order. Members: jpg, png or webp, txt (the caption), and json (the columns named by --keep). Rows whose image is
missing or broken, or that have no caption, are left out and listed; with --strict they stop the recipe.
"""

import glob
import json
import math
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from image_folder import member, printable

from diffusion_trainer.conventions import UserError, cores
from diffusion_trainer.streaming.damage import Damage
from diffusion_trainer.streaming.recipes import Job, Recipe, Skip, fingerprint, stamp
from diffusion_trainer.streaming.writing import arguments, positive, script, write

VERSION = 2  # of the shards; raise it when they change


def arrow():
    """pyarrow.parquet, which nothing else needs."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("parquet files need pyarrow: pip install 'diffusion-trainer[data]'") from error
    return parquet


class Group(NamedTuple):
    """A row group: what is read of a file at a time."""

    file: str
    number: int  # in the file
    rows: int
    stamp: tuple[int, int]  # of the file


class BadRow(Exception):
    """It cannot be used; the message says why."""


def files(patterns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        matching = sorted(glob.glob(f"{pattern}/*.parquet" if Path(pattern).is_dir() else pattern))
        if not matching:
            raise UserError(f"no parquet file matches {pattern}")
        found += matching
    return found


def groups(paths: Sequence[str], columns: Sequence[str]) -> list[Group]:
    """All row groups; UserError for a file that is none, or lacks a column."""
    found = []
    for path in paths:
        try:
            seen = stamp(Path(path))  # before the reading: what is changed meanwhile is another file next time
            file = arrow().ParquetFile(path)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise UserError(f"{path} cannot be read as parquet: {error}") from error
        with file:
            names = file.schema_arrow.names
            missing = [column for column in columns if column not in names]
            if missing:
                raise UserError(f"{path} has no column {missing[0]}; it has {', '.join(names)}")
            found += [Group(path, g, file.metadata.row_group(g).num_rows, seen) for g in range(file.num_row_groups)]
    return [group for group in found if group.rows]


@lru_cache(1)  # shards end within row groups
def table(group: Group, columns: tuple[str, ...]):
    try:
        with arrow().ParquetFile(group.file) as file:
            return file.read_row_group(group.number, list(columns), use_threads=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{group.file}, row group {group.number}, cannot be read: {error}") from error


@dataclass(frozen=True)
class ParquetCaptions(Recipe):
    groups: tuple[Group, ...]
    image: str  # columns
    caption: str
    keep: tuple[str, ...]
    root: Path  # of paths in the image column
    samples_per_shard: int
    max_side: int | None
    quality: int

    @property
    def settings(self) -> dict:
        return {
            "recipe": "parquet_captions",
            "version": VERSION,
            "rows": self._ends[-1],
            "names, sizes and times of files": fingerprint(
                (Path(g.file).name, g.number, g.rows, g.stamp) for g in self.groups
            ),
            "image": self.image,
            "caption": self.caption,
            "keep": self.keep,
            "samples_per_shard": self.samples_per_shard,
            "max_side": self.max_side,
            "quality": self.quality if self.max_side else None,
        }

    @property
    def _ends(self) -> list[int]:
        return list(accumulate(group.rows for group in self.groups))

    @property
    def num_shards(self) -> int:
        return math.ceil(self._ends[-1] / self.samples_per_shard)

    def samples(self, k: int, skip: Skip) -> Iterator[dict]:
        for i, where, row in self._rows(k * self.samples_per_shard, (k + 1) * self.samples_per_shard):
            try:
                extension, image = self._image(row[self.image])
                text = self._text(row[self.caption])
            except BadRow as error:
                skip(f"{where}: {error}")
                continue
            sample = {"__key__": f"{i:09d}", extension: image, "txt": text.encode()}
            kept = {column: row[column] for column in self.keep}
            yield sample | {"json": json.dumps(kept, default=str).encode()} if kept else sample

    def _rows(self, first: int, last: int) -> Iterator[tuple[int, str, Mapping]]:
        """Number, place and values of the rows first..last-1 of all files in a row."""
        ends = self._ends
        for g in range(bisect_right(ends, first), len(ends)):
            group, begin = self.groups[g], ends[g] - self.groups[g].rows
            if begin >= last:
                return
            whole = table(group, tuple(dict.fromkeys((self.image, self.caption, *self.keep))))
            for i in range(max(first, begin), min(last, ends[g])):
                where = f"{printable(group.file)}, row {i - begin} of row group {group.number}"
                yield i, where, whole.slice(i - begin, 1).to_pylist()[0]

    def _image(self, value: bytes | str | Mapping | None) -> tuple[str, bytes]:
        if isinstance(value, Mapping):  # as the datasets of Hugging Face have it
            value = value.get("bytes") or value.get("path")
        if not value:
            raise BadRow("no image")
        if not isinstance(value, bytes | str):
            raise BadRow(f"{self.image} has neither bytes nor a path but {type(value).__name__}")
        data = value if isinstance(value, bytes) else self._read(value)
        try:
            return member(data, self.max_side, self.quality)
        except Damage as error:
            raise BadRow(str(error)) from error

    def _read(self, path: str) -> bytes:
        inside = os.path.normpath(os.path.join(self.root, path))
        if os.path.commonpath([os.path.abspath(self.root), os.path.abspath(inside)]) != os.path.abspath(self.root):
            raise BadRow(f"{path} leads out of --root {self.root}")
        try:
            return Path(inside).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:  # a NUL in the name
            raise BadRow(f"there is no file {inside!r}") from error

    def _text(self, value: str | None) -> str:
        if not isinstance(value, str) or not value.strip():
            raise BadRow("no caption")
        return value


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], samples_per_shard=1000)
    parser.add_argument("files", nargs="+", help="parquet files, folders or patterns")
    parser.add_argument("--image", default="image", help="column of the images")
    parser.add_argument("--caption", default="caption", help="column of the captions")
    parser.add_argument("--keep", nargs="*", default=(), metavar="COLUMN", help="columns that go into the json member")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that paths in the image column start from")
    parser.add_argument("--max-side", type=positive, help="images with a longer side are made smaller; others stay")
    parser.add_argument("--quality", type=positive, default=95, help="of the JPEGs that were made smaller")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    parser.add_argument("--processes", type=positive, default=cores(), help="that read at the same time")
    a = parser.parse_args()
    found = groups(files(a.files), (a.image, a.caption, *a.keep))
    if not found:
        raise UserError(f"there are no rows in {', '.join(a.files)}")
    columns = (a.image, a.caption, tuple(a.keep))
    recipe = ParquetCaptions(tuple(found), *columns, a.root, a.samples_per_shard, a.max_side, a.quality)
    write(Job(recipe, a.out, a.name, a.strict), a.processes)


if __name__ == "__main__":
    sys.exit(script(main))
