"""Shards for the tests of streaming, made in every way there is, and the smallest fields there can be."""

import io
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import settings
from webdataset import TarWriter

from diffusion_trainer.streaming.damage import Undecodable, WrongShape
from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.streaming.fields import Field
from diffusion_trainer.streaming.index import Shard, write_index
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.scanning import scan, write_sidecars

END = bytes(1024)  # the end mark of a tar
Named = tuple[str, bytes]


def theorem(examples: int) -> settings:
    """The same examples in every run: a test that fails must fail again."""
    return settings(deadline=None, derandomize=True, max_examples=examples)


def header(
    name: bytes, size: int | bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000", prefix: bytes = b""
) -> bytes:
    """A tar header with its checksum; size may be the field's very bytes."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    parts = (
        name.ljust(100, b"\0"),
        b"0000644\0" * 3,
        field,
        b"00000000000\0",
        b" " * 8,
        kind,
        bytes(100),
        magic.ljust(88, b"\0"),
        prefix,
    )
    block = b"".join(parts).ljust(512, b"\0")
    assert len(block) == 512
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def member(name: str | bytes, data: bytes = b"", kind: bytes = b"0", **fields) -> bytes:
    """Header and padded data."""
    encoded = name if isinstance(name, bytes) else name.encode()
    return header(encoded, len(data), kind, **fields) + data + bytes(-len(data) % 512)


def pax(records: dict[str, str | bytes], kind: bytes = b"x") -> bytes:
    """A pax header with these records."""
    body = b""
    for key, value in records.items():
        line = b" %s=%s\n" % (key.encode(), value if isinstance(value, bytes) else value.encode())
        size = len(line)
        while len(line) + len(str(size)) != size:
            size = len(line) + len(str(size))
        body += str(size).encode() + line
    return member("././@PaxHeader", body, kind)


def python_tar(entries: Iterable[Named | tarfile.TarInfo], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """By Python's tarfile: files as (name, data), whatever has no data as a TarInfo."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return out.getvalue()


def gnu_tar(folder: Path, *options: str) -> bytes:
    """All of a folder by the `tar` command."""
    return subprocess.run(["tar", *options, "-cf", "-", "."], cwd=folder, check=True, capture_output=True).stdout


def webdataset_tar(samples: Iterable[dict], **options) -> bytes:
    out = io.BytesIO()
    with TarWriter(out, **options) as tar:
        for sample in samples:
            tar.write(dict(sample))
    return out.getvalue()


def row(number: int, width: int = 3) -> np.ndarray:
    """What `Row` reads from sample `number`."""
    return np.arange(number, number + width)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def members_of(number: int, width: int = 3) -> list[Named]:
    """Of the sample whose class and array say its number."""
    return [(f"{number:06d}.cls", b"%d" % number), (f"{number:06d}.npy", npy(row(number, width)))]


def shard_bytes(numbers: Iterable[int], width: int = 3) -> bytes:
    return b"".join(member(*m) for n in numbers for m in members_of(n, width)) + END


def indexed(path: Path, data: bytes) -> Shard:
    """Writes a tar and all of its index."""
    path.write_bytes(data)
    found = scan(path)
    assert found.damage is None, found.damage
    write_sidecars(path, found)
    write_index(path.parent, [found.shard(path.name)])
    return found.shard(path.name)


def write_set(folder: Path, counts: Sequence[int], name: str = "x", first: int = 0, width: int = 3) -> list[Path]:
    """Indexed shards with so many samples each, which are numbered from `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = first + np.cumsum([0, *counts])
    paths = [folder / f"{name}-{k:03d}.tar" for k in range(len(counts))]
    shards = []
    for path, a, b in zip(paths, starts, starts[1:], strict=False):
        path.write_bytes(shard_bytes(range(a, b), width))
        found = scan(path)
        write_sidecars(path, found)
        shards.append(found.shard(path.name))
    write_index(folder, shards)
    return paths


@dataclass(frozen=True)
class Number(Field):
    """The class, which is the sample's number."""

    extensions = ("cls",)
    stored = ()
    dtype = np.dtype(np.int64)

    def decode(self, data, out, draws):
        try:
            out[...] = int(bytes(data))
        except ValueError as error:
            raise Undecodable(str(error)) from error


@dataclass(frozen=True)
class Row(Field):
    """A small array."""

    width: int = 3
    extensions = ("npy",)
    dtype = np.dtype(np.int64)

    @property
    def stored(self):
        return (self.width,)

    def decode(self, data, out, draws):
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise Undecodable(str(error)) from error
        if array.shape != out.shape:
            raise WrongShape(f"{array.shape}, not {out.shape}")
        out[...] = array


@dataclass(frozen=True)
class Text(Field):
    """The class as an object, and what is drawn for the sample."""

    extensions = ("cls",)
    stored = None
    dtype = None

    def decode(self, data, out, draws):
        return f"{bytes(data).decode()} {draws.number} {draws.uniform('flip')}"


def shard_data(shards: str | Sequence[str] | None, **options) -> ShardData:
    fields = options.pop("fields", {"image": Row(), "label": Number()})
    return ShardData(fields, shards, **options)


def pieces(data: ShardData, layout: Layout, steps: range, seed: int = 0, lanes: int = 4) -> list[dict]:
    return list(data.loader(layout, seed, lanes, steps.start, steps.stop))


@dataclass
class Whole:
    """Global batches put together again from the pieces of all ranks."""

    labels: np.ndarray  # (steps, batch)
    rows: np.ndarray  # (steps, batch, width)
    samples: np.ndarray  # (steps, batch, 2)
    found: list  # of damage, sorted

    def __eq__(self, other):
        arrays = ("labels", "rows", "samples")
        return self.found == other.found and all(np.array_equal(getattr(self, a), getattr(other, a)) for a in arrays)


def whole(data: ShardData, batch: int, steps: range, world: int = 1, micro_batches: int = 1, **order) -> Whole:
    """What all ranks of a world read together."""
    count = world * micro_batches
    labels = np.full((len(steps), batch), -1)
    samples = np.full((len(steps), batch, 2), -1)
    rows = np.full((len(steps), batch, data.entries["image"].width), -1)
    found = []
    for rank in range(world):
        layout = Layout(batch, world, rank, micro_batches)
        got = pieces(data, layout, steps, **order)
        assert len(got) == len(steps) * micro_batches
        for k, piece in enumerate(got):
            step, micro_batch = divmod(k, micro_batches)
            c = rank * micro_batches + micro_batch
            assert piece["first"] == (steps.start + step) * batch + c
            labels[step, c::count], samples[step, c::count] = piece["label"], piece["samples"]
            rows[step, c::count] = piece["image"]
            found += piece["damage"]
    return Whole(labels, rows, samples, sorted(found))
