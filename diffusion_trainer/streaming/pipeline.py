"""A plain webdataset pipeline, for shards that nobody can index."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset import DataPipeline, ResampledShards, shuffle

from diffusion_trainer.conventions import UserError, plain, seed_of
from diffusion_trainer.streaming.base import Data
from diffusion_trainer.streaming.damage import Damage, Found, Hopeless, MissingShard
from diffusion_trainer.streaming.fields import Draws, Field
from diffusion_trainer.streaming.loader import Filled, Layout, Loader, Piece, Stop
from diffusion_trainer.streaming.remote import WITNESSES, Gone, NothingThere, Remote, check_there
from diffusion_trainer.streaming.retries import Retries
from diffusion_trainer.streaming.ring import Ring
from diffusion_trainer.streaming.streams import GZIP, samples
from diffusion_trainer.streaming.urls import expanded, is_pipe

MAX_BAD = 1000  # failures in a row, of samples or shards
NOWHERE = -1  # the number of a sample that has no place in an index


@dataclass(frozen=True)
class WebDatasetPipeline(Data):
    """Shards drawn with replacement, their samples shuffled in a buffer, by webdataset; read and decoded by us.

    shards: paths, braces, http(s)://, s3://, gs:// or whatever else fsspec opens, one or a list. `pipe:` runs a shell
    command and needs allow_pipe. max_sample_bytes: of the members that `fields` name; a larger sample is damaged.
    retries, backoff_seconds, timeout_seconds, storage_options: as in `CachedStore`, of local files, too.

    Every rank gets equal batches, for as many steps as it asks. There is no epoch and no exact resume: a run that goes
    on draws other shards than it would have without a stop (the draws depend on seed, step, rank and worker).
    """

    fields: Mapping[str, Field | None]
    shards: str | Sequence[str]
    shuffle_buffer: int = 5000
    allow_pipe: bool = False
    retries: int = 10
    backoff_seconds: float = 0.5
    timeout_seconds: float = 60.0
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    max_sample_bytes: int = 1 << 28
    damage_budget: float = 0.001
    num_workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        self.check_fields()
        if min(self.shuffle_buffer, self.prefetch, self.max_sample_bytes) < 1 or self.num_workers < 0:
            raise ValueError("shuffle_buffer, prefetch and max_sample_bytes must be positive, num_workers not negative")
        if not self.allow_pipe and any(is_pipe(url) for url in self.urls):
            raise ValueError("a shard's pipe: runs a shell command; set allow_pipe=true if that is what you want")
        self._check_names()
        _ = self.remote, self.patience  # what they refuse is refused before a run begins

    @cached_property
    def urls(self) -> list[str]:
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        return [url for pattern in patterns for url in expanded(pattern)]

    def _check_names(self) -> None:
        if not self.urls or "" in self.urls:
            raise ValueError("shards names none; give paths, URLs or braces: x-{000..099}.tar")
        for url in self.urls:
            if "*" in url and not is_pipe(url) and not os.path.exists(url):
                raise ValueError(f"shards: {url}: * names nothing here; use braces, x-{{000..099}}.tar, or a list")
            if not url.endswith((".tar", *GZIP)) and os.path.isdir(url):  # there may be a hundred thousand to look at
                raise ValueError(f"shards: {url} is a folder; name its files: {url.rstrip('/')}/x-{{000..099}}.tar")

    @cached_property
    def remote(self) -> Remote:
        return Remote(self.timeout_seconds, self.storage_options, self.allow_pipe)

    @cached_property
    def patience(self) -> Retries:
        return Retries(self.retries, self.backoff_seconds)

    @cached_property
    def wanted(self) -> frozenset[str]:
        """Extensions of the members that fields may ask for."""
        return frozenset(extension for field in self.entries.values() for extension in field.extensions)

    @property
    def fingerprint(self) -> None:
        return None

    @property
    def count(self) -> None:
        return None

    def first(self, count: int) -> dict[str, Any]:
        ring = Ring(1, 1, [self.decoder.entries(count)])
        try:
            filled = _Stream(self, Layout(count), range(1), 0, ring).fill(range(count), ring.arrays(0))
        except NothingThere as nothing:  # before a run it is a mistake
            raise UserError(str(nothing)) from nothing
        return self.decoder.batch([torch.from_numpy(array) for array in ring.arrays(0)], filled.objects)

    def loader(self, layout: Layout, seed: int, lanes: int, first_step: int, last_step: int) -> Loader:
        items = range(first_step * layout.micro_batches, last_step * layout.micro_batches)
        source = partial(_Stream, self, layout, items, seed)
        return Loader(source, self.decoder, layout, items, self.num_workers, self.prefetch, indexed=False)


class _Sample(NamedTuple):
    url: str
    key: str
    members: Mapping[str, bytes | Damage]  # by extension


class _Stream(IterableDataset):
    """Pieces, as one worker makes them: of W workers it has every W-th item."""

    def __init__(self, data: WebDatasetPipeline, layout: Layout, items: range, seed: int, ring: Ring):
        self.data, self.layout, self.items, self.ring = data, layout, items, ring
        self.seed = seed
        self._found: list[Found] = []
        self._without = 0  # shards opened since the last sample
        self._had = ""  # the shard of the last sample
        self._gone: set[str] = set()
        self._samples: Iterator[_Sample] | None = None

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
            self._samples = self._drawn(seed_of(self.seed, "shards", numbers.start))
        names = [("", "")] * len(numbers)

        def read(row: int) -> dict[str, memoryview]:
            sample = self._next()
            names[row] = sample.url, sample.key
            for data in sample.members.values():
                if isinstance(data, Damage):
                    raise data
            return {name: memoryview(data) for name, data in sample.members.items()}

        def failed(row: int, damage: Damage) -> None:
            url, key = names[row]
            self._report(damage, url, f"{plain(key)}: {damage}")

        objects = self.data.decoder.fill(arrays, Draws(self.seed, numbers), read, failed)
        found, self._found = self._found, []
        return Filled(objects, np.full((len(numbers), 2), NOWHERE), found)

    def _drawn(self, seed: int) -> Iterator[_Sample]:
        """For ever."""
        buffer = self.data.shuffle_buffer
        stages = [
            ResampledShards(self.data.urls, seed=seed, worker_seed=lambda: seed, deterministic=True),
            self._read,
            shuffle(buffer, initial=min(100, buffer), seed=seed),
        ]
        return iter(DataPipeline(*stages))

    def _read(self, drawn: Iterable[dict[str, str]]) -> Iterator[_Sample]:
        data = self.data
        for url in (shard["url"] for shard in drawn):
            self._without += 1
            if self._without > MAX_BAD:
                raise UserError(f"data.shards: {MAX_BAD} shards in a row hold no samples, the last one is {url}")
            try:
                if url in self._gone:
                    raise MissingShard("there is no such object")
                for key, members in samples(data.remote, data.patience, url, data.wanted, data.max_sample_bytes):
                    self._without, self._had = 0, url
                    yield _Sample(url, key, members)
            except Gone:
                self._check_store(url)
                self._gone.add(url)
                self._report(MissingShard("there is no such object"), url)
            except Damage as damage:
                self._report(damage, url)

    def _check_store(self, url: str) -> None:
        """A shard is missing only from a store that has others."""
        others = [other for other in (self._had, *self.data.urls[: WITNESSES + 1]) if other and not is_pipe(other)]
        check_there(self.data.remote, self.data.patience, url, [o for o in dict.fromkeys(others) if o != url])

    def _next(self) -> _Sample:
        for sample in self._samples:
            return sample
        raise UserError("data.shards: they hold no samples")

    def _report(self, damage: Damage, url: str, message: str = "") -> None:
        self._found.append(Found(damage.kind, url, NOWHERE, message or str(damage)))
        self._give_up()

    def _give_up(self) -> None:
        if len(self._found) >= MAX_BAD:
            last = "\n".join(f"  {f.kind}: {plain(f.shard)}: {f.message}" for f in self._found[-8:])
            raise Hopeless(f"{MAX_BAD} failures within one batch; the last ones:\n{last}", self._found)
