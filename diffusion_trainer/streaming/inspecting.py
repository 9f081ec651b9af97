"""Looks into shards that somebody made: which they are, whether they are whole, and what is in their samples."""

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from isal import isal_zlib
from PIL import Image
from webdataset.shardlists import expand_urls

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.damage import BadChecksum, Damage, Found, MissingShard, Truncated
from diffusion_trainer.streaming.describing import describe
from diffusion_trainer.streaming.index import CHECKSUMS, INDEX, OFFSETS, Shard
from diffusion_trainer.streaming.samples import Samples
from diffusion_trainer.streaming.scanning import PIECE, Scan, scan
from diffusion_trainer.streaming.stores import Folder, LocalStore, Stale, folders, matching

WRONG_INDEX = "wrong_index"  # beside the kinds of damage: what the index says does not fit
WHOLE = -1  # the sample of a finding that concerns the whole shard
MAX_BYTES = 1 << 28  # of a sample that is looked at
THUMBNAIL = 128  # pixels, the larger side of pictures that are kept
MAX_VALUES = 10_000  # different ones of an extension that are counted


class Listed(NamedTuple):
    """A shard that a pattern names."""

    path: Path
    shard: Shard | None  # as its index has it, the url being the path; None: it has no index


class Contents(NamedTuple):
    """What is known of a shard before its samples are looked at."""

    shard: Shard
    found: Sequence[Found]
    scan: Scan | None  # of one without index

    @property
    def readable(self) -> bool:
        return not any(f.kind in (MissingShard.kind, WRONG_INDEX) for f in self.found)


def find(pattern: str) -> list[Listed]:
    """The shards that a path, glob or brace pattern names: those that are there, and those that its index has. Of a
    folder, or the index in it: all *.tar. UserError if there are none."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise UserError(f"{pattern} is no local path; inspect a copy")
    listed = cache(_folders)
    try:
        return [one for name in expand_urls(pattern) for one in _matching(Path(name), listed)]
    except (OSError, ValueError) as error:
        raise UserError(f"{pattern} cannot be read ({error})") from error


def _folders(path: Path) -> list[tuple[Path, Mapping[str, Shard | None]]]:
    return [(folder.path, _shards_in(folder)) for folder in folders(path)]


def _shards_in(folder: Folder) -> dict[str, Shard | None]:
    """By name, those that are there or in the index; None: it is not in the index."""
    new = (name for name in folder.new - {INDEX} if not name.startswith("."))
    return {name: None for name in new if (folder.path / name).is_file()} | folder.indexed


def _matching(path: Path, listed: Callable[[Path], list[tuple[Path, Mapping]]]) -> list[Listed]:
    if path.is_dir():
        path = path / "*.tar"
    elif path.name == INDEX:
        path = path.with_name("*.tar")
    found = [
        Listed(folder / name, shards[name])
        for folder, shards in listed(path.parent)
        for name in matching(shards, path.name)
    ]
    if not found:
        raise UserError(f"no file matches {path} (looked in {path.absolute().parent})")
    return found


def examine(listed: Listed, verify: bool) -> Contents:
    """Scans a shard without index. verify: reads every byte of one with index, and compares. UserError where a file
    cannot be read."""
    try:
        if listed.shard is not None:
            return Contents(listed.shard, list(_compared(listed.shard, verify)), None)
        found = scan(listed.path)
    except OSError as error:
        raise UserError(f"{listed.path} cannot be read ({error.strerror})") from error
    shard = found.shard(str(listed.path))
    damage = [Found(found.damage.kind, shard.url, shard.samples, str(found.damage))] if found.damage else []
    return Contents(shard, damage, found)


def _compared(shard: Shard, verify: bool) -> Iterator[Found]:
    path = Path(shard.url)
    if not path.is_file():
        yield Found(
            MissingShard.kind, shard.url, WHOLE, f"there is no such file; its index has {shard.samples} samples"
        )
        return
    size = path.stat().st_size
    wrong = f"it has {size} bytes, its index says {shard.size}"
    if size > shard.size:
        yield Found(WRONG_INDEX, shard.url, WHOLE, f"{wrong}: it was written again")
        return
    found = []
    if verify:
        try:
            found = list(_verified(shard, *_tables(shard)))
        except UserError as error:
            found = [Found(WRONG_INDEX, shard.url, WHOLE, str(error))]
    yield from found
    if size < shard.size and not any(f.kind == Truncated.kind for f in found):
        yield Found(Truncated.kind, shard.url, WHOLE, wrong)


def _tables(shard: Shard) -> tuple[list[int], list[int]]:
    """Offsets and checksums of the samples; UserError if they cannot be those of the shard."""
    store = LocalStore()
    offsets, checksums = store.sidecar(shard, OFFSETS), store.sidecar(shard, CHECKSUMS)
    if len(offsets) != 8 * (shard.samples + 1) or len(checksums) != 4 * shard.samples:
        raise UserError(f"{OFFSETS} or {CHECKSUMS} beside it is not of {shard.samples} samples, as its index says")
    if not shard.fits(OFFSETS, offsets) or not shard.fits(CHECKSUMS, checksums):
        raise UserError(f"{OFFSETS} or {CHECKSUMS} beside it is not the one that its index was written with")
    places = np.frombuffer(offsets, "<u8")
    if (places[1:] < places[:-1]).any() or places[-1] > shard.size:
        raise UserError(f"{OFFSETS} beside it names bytes that it does not have")
    return places.tolist(), np.frombuffer(checksums, "<u4").tolist()


def _verified(shard: Shard, offsets: Sequence[int], checksums: Sequence[int]) -> Iterator[Found]:
    """Reads every byte once, for the checksum of its sample and that of the file."""
    whole, good = 0, True
    with open(shard.url, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for i, (first, last) in enumerate(pairwise((0, *offsets, shard.size)), WHOLE):
            own = 0
            for at in range(first, min(last, size), PIECE):
                piece = os.pread(file.fileno(), min(PIECE, last - at), at)
                own, whole = isal_zlib.crc32(piece, own), isal_zlib.crc32(piece, whole)
            if not 0 <= i < shard.samples:
                continue
            if last > size:
                yield Found(Truncated.kind, shard.url, i, f"it ends at byte {last}, the file at {size}")
            elif own != checksums[i]:
                good = False
                yield Found(BadChecksum.kind, shard.url, i, "its bytes are not those that were indexed")
    if good and size == shard.size and whole != shard.crc32:
        yield Found(BadChecksum.kind, shard.url, WHOLE, "bytes that are in no sample are not those that were indexed")


@dataclass
class Member:
    """One extension, over the samples that were looked at."""

    sizes: list[int] = field(default_factory=list)  # bytes
    shapes: Counter[str] = field(default_factory=Counter)
    values: Counter[str] = field(default_factory=Counter)


@dataclass
class Survey:
    """What was found in the samples that were looked at."""

    looked_at: int = 0
    seconds: float = 0.0  # of reading and decoding
    members: dict[str, Member] = field(default_factory=dict)
    pictures: list[Image.Image] = field(default_factory=list)  # RGB, made smaller if they are large
    found: list[Found] = field(default_factory=list)


@dataclass
class _Scanned(LocalStore):
    """Shards on disks of which some have no index files, but a scan."""

    scans: Mapping[str, Scan] = field(default_factory=dict)

    def sidecar(self, shard: Shard, suffix: str) -> bytes:
        if shard.url not in self.scans:
            return super().sidecar(shard, suffix)
        found = self.scans[shard.url]
        return {OFFSETS: found.offsets, CHECKSUMS: found.checksums}[suffix].tobytes()


def look(contents: Sequence[Contents], num_samples: int | None, num_pictures: int) -> Survey:
    """Reads and decodes samples that are spread evenly over the shards (None: all), and keeps pictures of some."""
    here = [c for c in contents if c.readable]
    store = _Scanned(scans={c.shard.url: c.scan for c in here if c.scan is not None})
    samples = Samples([c.shard for c in here], store, MAX_BYTES)
    ends = list(accumulate(c.shard.samples for c in here))
    total = ends[-1] if ends else 0
    count = total if num_samples is None else min(num_samples, total)
    survey, usable = Survey(), {}
    for j in range(count):
        number = (2 * j + 1) * total // (2 * count)  # the middle of the j-th of `count` equal parts
        k = bisect_right(ends, number)
        if k not in usable:
            usable[k] = here[k].scan is not None or _has_tables(here[k].shard, survey)
        if usable[k]:
            try:
                picture = _look_at(samples, k, number - ends[k] + here[k].shard.samples, survey)
            except Stale as other:
                survey.found.append(Found(WRONG_INDEX, here[k].shard.url, WHOLE, str(other)))
                usable[k] = False
                continue
            if picture is not None and j * num_pictures // count < (j + 1) * num_pictures // count:
                survey.pictures.append(_small(picture))
    return survey


def _small(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def _has_tables(shard: Shard, survey: Survey) -> bool:
    try:
        _tables(shard)
    except UserError as error:
        survey.found.append(Found(WRONG_INDEX, shard.url, WHOLE, str(error)))
        return False
    return True


def _look_at(samples: Samples, k: int, i: int, survey: Survey) -> np.ndarray | None:
    """Its picture, if it has one."""
    begin, picture, of = perf_counter(), None, ""
    survey.looked_at += 1
    try:
        for extension, data in samples.read(k, i).items():
            of = f".{extension}: "
            member = survey.members.setdefault(extension, Member())
            member.sizes.append(len(data))
            found = describe(extension, data)
            member.shapes[found.shape] += 1
            if found.value is not None and len(member.values) < MAX_VALUES:
                member.values[found.value] += 1
            picture = found.picture if picture is None else picture
    except Damage as damage:
        survey.found.append(Found(damage.kind, samples.shards[k].url, i, f"{of}{damage}"))
    finally:
        survey.seconds += perf_counter() - begin
    return picture
