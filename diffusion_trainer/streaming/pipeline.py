"""A plain webdataset pipeline, for shards that nobody can index."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset import DataPipeline, ResampledShards, shuffle, tarfile_to_samples

from diffusion_trainer.conventions import UserError, seed_of
from diffusion_trainer.streaming.base import Data
from diffusion_trainer.streaming.damage import BadArchive, Damage, Found, Hopeless
from diffusion_trainer.streaming.fields import Draws, Field
from diffusion_trainer.streaming.loader import Filled, Layout, Loader, Piece, Stop
from diffusion_trainer.streaming.ring import Ring
from diffusion_trainer.streaming.urls import expanded

MAX_BAD = 1000  # failures in a row, of samples or shards
NOWHERE = -1  # the number of a sample that has no place in an index


@dataclass(frozen=True)
class WebDatasetPipeline(Data):
    """Shards drawn with replacement, their samples shuffled in a buffer: webdataset's own reading, our decoders.

    shards: whatever webdataset opens: paths, braces, http(s), gs; `pipe:` runs a shell command and needs allow_pipe.
    Every rank gets equal batches, for as many steps as it asks. There is no epoch and no exact resume: a run that goes
    on draws other shards than it would have without a stop (the draws depend on seed, step, rank and worker).
    """

    fields: Mapping[str, Field | None]
    shards: str | Sequence[str]
    shuffle_buffer: int = 5000
    allow_pipe: bool = False
    damage_budget: float = 0.001
    num_workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        self.check_fields()
        if min(self.shuffle_buffer, self.prefetch) < 1 or self.num_workers < 0:
            raise ValueError("shuffle_buffer and prefetch must be positive, num_workers not negative")
        if not self.allow_pipe and any(url.startswith("pipe:") for url in self.urls):
            raise ValueError("a shard's pipe: runs a shell command; set allow_pipe=true if that is what you want")

    @property
    def urls(self) -> list[str]:
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        return [url for pattern in patterns for url in expanded(pattern)]

    @property
    def fingerprint(self) -> None:
        return None

    @property
    def count(self) -> None:
        return None

    def samples(
        self, seed: int, opened: Callable[[str], None], failed: Callable[[Exception], bool]
    ) -> Iterator[dict[str, bytes]]:
        """Undecoded samples for ever; opened(url) is told of each shard, failed(exception) of what cannot be read."""

        def watched(urls: Iterable[dict]) -> Iterator[dict]:
            for url in urls:
                opened(url["url"])
                yield url

        stages = [
            ResampledShards(self.urls, seed=seed, worker_seed=lambda: seed, deterministic=True),
            watched,
            tarfile_to_samples(handler=failed),
            shuffle(self.shuffle_buffer, initial=min(100, self.shuffle_buffer), seed=seed),
        ]
        return iter(DataPipeline(*stages))

    def first(self, count: int) -> dict[str, Any]:
        ring = Ring(1, 1, [self.decoder.entries(count)])
        filled = _Stream(self, Layout(count), range(1), 0, ring).fill(range(count), ring.arrays(0))
        return self.decoder.batch([torch.from_numpy(array) for array in ring.arrays(0)], filled.objects)

    def loader(self, layout: Layout, seed: int, lanes: int, first_step: int, last_step: int) -> Loader:
        items = range(first_step * layout.micro_batches, last_step * layout.micro_batches)
        source = partial(_Stream, self, layout, items, seed)
        return Loader(source, self.decoder, layout, items, self.num_workers, self.prefetch, indexed=False)


class _Stream(IterableDataset):
    """Pieces, as one worker makes them: of W workers it has every W-th item."""

    def __init__(self, data: WebDatasetPipeline, layout: Layout, items: range, seed: int, ring: Ring):
        self.data, self.layout, self.items, self.ring = data, layout, items, ring
        self.seed = seed
        self._found: list[Found] = []
        self._without = 0  # shards opened since the last sample
        self._samples: Iterator[dict[str, bytes]] | None = None

    def __iter__(self) -> Iterator[Piece | Stop]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            for made in count():
                item = self.items.start + worker + made * workers
                if item >= self.items.stop:
                    return
                slot = self.ring.take(worker)
                yield Piece(slot, 0, self.fill(self.layout.numbers(item), self.ring.arrays(slot)))
        except UserError as error:
            yield Stop.of(error)

    def fill(self, numbers: range, arrays: Sequence[np.ndarray]) -> Filled:
        if self._samples is None:
            # Other draws for every process, and after a restart other ones than before it.
            seed = seed_of(self.seed, "shards", numbers.start)
            self._samples = self.data.samples(seed, self._opened, self._failed)
        names = [("", "")] * len(numbers)

        def read(row: int) -> dict[str, memoryview]:
            sample = self._next()
            names[row] = sample["__url__"], sample["__key__"]
            return {name: memoryview(value) for name, value in sample.items() if not name.startswith("__")}

        def failed(row: int, damage: Damage) -> None:
            url, key = names[row]
            self._found.append(Found(damage.kind, url, NOWHERE, f"{key}: {damage}"))
            self._give_up()

        objects = self.data.decoder.fill(arrays, Draws(self.seed, numbers), read, failed)
        found, self._found = self._found, []
        return Filled(objects, np.full((len(numbers), 2), NOWHERE), found)

    def _next(self) -> dict[str, Any]:
        for sample in self._samples:
            self._without = 0
            return sample
        raise UserError("data.shards: they hold no samples")

    def _opened(self, url: str) -> None:
        self._without += 1
        if self._without > MAX_BAD:
            raise UserError(f"data.shards: {MAX_BAD} shards in a row hold no samples, the last one is {url}")

    def _failed(self, error: Exception) -> bool:
        """webdataset's handler of a shard that it cannot open, or not read to its end: True goes on with the next."""
        url = next((str(a) for a in reversed(error.args) if isinstance(a, str)), "?")
        self._found.append(Found(BadArchive.kind, url, NOWHERE, f"{type(error).__name__}: {error.args[:1]}"))
        self._give_up()
        return True

    def _give_up(self) -> None:
        if len(self._found) >= MAX_BAD:
            last = "\n".join(f"  {f.kind}: {f.shard}: {f.message}" for f in self._found[-8:])
            raise Hopeless(f"{MAX_BAD} failures within one batch; the last ones:\n{last}", self._found)
