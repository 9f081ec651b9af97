"""The two sets of benchmarks/streaming.py, in all formats, and what reads them."""

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from diffusion_trainer.streaming.arrays import Label, Latent
from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.streaming.decoding import picture_of
from diffusion_trainer.streaming.fields import Field
from diffusion_trainer.streaming.images import Image
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.npy import npy
from diffusion_trainer.streaming.pipeline import WebDatasetPipeline
from diffusion_trainer.streaming.writer import write_shards

# A script's folder is the first that imports look in, where streaming.py has the name of MosaicML's package.
sys.path = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]

DISTINCT = 512  # contents; a set repeats them
CHUNK = 64 << 20  # bytes of the others' shards
LANES = 8
Start = Callable[[], Iterator[Any]]  # opens the shards and begins


def picture(i: int, side: int = 256) -> np.ndarray:
    """(side, side, 3) uint8 with the spectrum of photographs (amplitude about 1/f), and edges."""
    rng = np.random.default_rng(i)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    f[0, 0] = np.inf
    waves = rng.normal(size=(3, *f.shape)) + 1j * rng.normal(size=(3, *f.shape))
    planes = np.fft.irfft2(waves / f**1.46, (side, side))
    planes /= planes.std((1, 2), keepdims=True)
    y, x = np.mgrid[:side, :side] / side
    for _ in range(6):  # edges: half planes and discs
        a, b, c = rng.uniform(-1, 1, 3)
        planes[0] += 0.6 * ((a * x + b * y + c / 2) > 0)
        planes[0] -= 0.8 * (np.hypot(x - abs(a), y - abs(b)) < abs(c) / 3)
    luma, blue, red = planes[0] - planes[0].mean(), 0.25 * planes[1], 0.25 * planes[2]
    pixels = 128 + 42 * np.stack([luma + red, luma - 0.4 * red - 0.2 * blue, luma + blue], -1)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def jpeg(i: int) -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(picture(i)).save(file, format="jpeg", quality=90)
    return file.getvalue()


def latent(i: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.random.default_rng(i).normal(size=(4, 32, 32)).astype(np.float16))
    return file.getvalue()


@dataclass(frozen=True)
class Set:
    name: str
    count: int
    batch: int
    per_shard: int
    extension: str
    make: Callable[[int], bytes]
    field: Field  # ours
    ours: Callable[[bytes], np.ndarray]  # what our field does, for others' loaders
    webdataset: tuple[str, ...]  # arguments of its decode()
    mds: str  # its column

    def decoded(self, sample: Mapping) -> tuple[Any, int]:
        """Of a sample of the others' formats: they keep JPEGs as bytes, for our decoder, and latents as arrays."""
        return self.ours(sample["image"]) if self.mds == "bytes" else sample["image"], sample["label"]

    def samples(self) -> Iterator[tuple[bytes, int]]:
        kept: list[bytes] = []
        for i in range(self.count):
            if len(kept) < DISTINCT:
                kept.append(self.make(i))
            yield kept[i % DISTINCT], i % 1000


SETS = {
    s.name: s
    for s in (
        Set("latents", 1 << 16, 256, 4096, "npy", latent, Latent(4, 32, 32, extension="npy"),
            lambda data: npy(memoryview(data)), (), "ndarray:float16:4,32,32"),
        Set("jpeg", 1 << 13, 128, 512, "jpg", jpeg, Image(3, 256, 256),
            lambda data: picture_of(memoryview(data)).pixels(3)[0], ("rgb8",), "bytes"),
    )
}  # fmt: skip


# ---- the contenders: each imports what it needs, and returns what starts it ----


def shard_data(s: Set, folder: Path, workers: int) -> Start:
    def start():
        data = ShardData({"image": s.field, "label": Label()}, f"{folder}/tar/*.tar", num_workers=workers)
        return iter(data.loader(Layout(s.batch), 0, LANES, 0, 1 << 40))

    return start


def pipeline(s: Set, folder: Path, workers: int) -> Start:
    def start():
        fields = {"image": s.field, "label": Label()}
        urls = sorted(map(str, (folder / "tar").glob("*.tar")))
        data = WebDatasetPipeline(fields, urls, shuffle_buffer=1000, num_workers=workers)
        return iter(data.loader(Layout(s.batch), 0, LANES, 0, 1 << 40))

    return start


def webdataset(s: Set, folder: Path, workers: int, ours: bool = False) -> Start:
    import webdataset as wds

    urls = sorted(map(str, (folder / "tar").glob("*.tar")))

    def start():
        data = wds.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(1000)
        decoders = {s.extension: s.ours, "cls": int}
        data = data.map_dict(**decoders) if ours else data.decode(*s.webdataset)
        data = data.to_tuple(s.extension, "cls").batched(s.batch)
        return iter(wds.WebLoader(data, batch_size=None, num_workers=workers))

    return start


def mosaic(s: Set, folder: Path, workers: int) -> Start:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Samples(StreamingDataset):
        def __getitem__(self, at):
            return s.decoded(super().__getitem__(at))

    def start():
        data = Samples(local=str(folder / "mds"), shuffle=True, batch_size=s.batch)
        return _epochs(DataLoader(data, s.batch, num_workers=workers, drop_last=True, persistent_workers=workers > 0))

    return start


def litdata(s: Set, folder: Path, workers: int, **options: Any) -> Start:
    from litdata import StreamingDataLoader, StreamingDataset

    class Samples(StreamingDataset):
        def __getitem__(self, at):
            return s.decoded(super().__getitem__(at))

    def start():
        data = Samples(str(folder / "litdata"), shuffle=True, drop_last=True, **options)
        return _epochs(StreamingDataLoader(data, batch_size=s.batch, num_workers=workers, drop_last=True))

    return start


def _epochs(loader) -> Iterator:
    while True:
        yield from loader


CONTENDERS: Mapping[str, Callable[[Set, Path, int], Start]] = {
    "ours": shard_data,
    "ours, data=webdataset": pipeline,
    "webdataset": webdataset,
    "webdataset, our decoder": partial(webdataset, ours=True),
    "MosaicML Streaming": mosaic,
    "LitData": litdata,
    "LitData, batch_decode=256": partial(litdata, batch_decode=256),  # the window within which it shuffles
}


# ---- the data ----


def make(s: Set, folder: Path) -> None:
    """In all formats whose libraries are there."""
    for name, write in (("tar", _tars), ("mds", _mds), ("litdata", _chunks)):
        done = folder / f"{name}.done"
        if not done.exists():
            try:
                write(s, folder / name)
            except ImportError as missing:
                print(f"{missing}: it is left out", file=sys.stderr)
                continue
            done.touch()


def _tars(s: Set, folder: Path) -> None:
    members = ({"__key__": f"{i:08d}", s.extension: x, "cls": b"%d" % y} for i, (x, y) in enumerate(s.samples()))
    write_shards(members, folder, s.name, s.per_shard)


def _mds(s: Set, folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"image": s.mds, "label": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK, exist_ok=True) as writer:
        for data, label in s.samples():
            writer.write({"image": data if s.mds == "bytes" else s.ours(data), "label": label})


def _chunks(s: Set, folder: Path) -> None:
    import torch
    from litdata import optimize

    kept = [s.make(i) for i in range(DISTINCT)]
    images = kept if s.mds == "bytes" else [torch.from_numpy(s.ours(data).copy()) for data in kept]
    global item  # that its processes find it

    def item(i: int) -> dict:
        return {"image": images[i % DISTINCT], "label": i % 1000}

    optimize(item, list(range(s.count)), str(folder), chunk_bytes=CHUNK, num_workers=1, start_method="fork")
