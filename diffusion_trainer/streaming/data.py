"""Shards with an index, as data of a configuration."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.base import Data
from diffusion_trainer.streaming.batches import Items, Reader
from diffusion_trainer.streaming.buckets import Bucketed, bucketed, nearest
from diffusion_trainer.streaming.damage import Damage
from diffusion_trainer.streaming.fields import Decoder, Draws, Field
from diffusion_trainer.streaming.index import SIZES, Shard
from diffusion_trainer.streaming.loader import Layout, Loader
from diffusion_trainer.streaming.mixing import Mix, in_proportion
from diffusion_trainer.streaming.order import Order
from diffusion_trainer.streaming.samples import Samples
from diffusion_trainer.streaming.stores import LocalStore, Store, remedy, stale


@dataclass(frozen=True)
class Source:
    """Shards that are mixed with others: so much of them, relative to the other sources' weights."""

    shards: str | Sequence[str]
    weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight must be positive, not {self.weight}; set a source to null to leave it out")


@dataclass(frozen=True)
class ShardData(Data):
    """WebDataset shards in an order that depends on their index, the seed and the lanes alone.

    shards: path, glob or brace pattern, or a list of them; or sources: several of these by name, each with a weight.
    window: how many samples of a lane are shuffled among each other (best one or two shards' worth). mixing_period: so
    many samples of a lane have each source's share (of steps, each bucket's), rounded down or up. buckets: [height,
    width] of each shape that batches may have; an image is in the nearest one (the index needs their sizes:
    image_sizes=true).
    """

    fields: Mapping[str, Field | None]
    shards: str | Sequence[str] | None = None
    sources: Mapping[str, Source | None] | None = None
    store: Store = field(default_factory=LocalStore)
    window: int = 16384
    mixing_period: int = 1000
    buckets: Sequence[Sequence[int]] | None = None
    max_sample_bytes: int = 1 << 28
    damage_budget: float = 0.001
    num_workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        if (self.shards is None) == (self.sources is None):
            raise ValueError("say either shards, or sources (several by name, with weights)")
        if self.sources is not None and not any(self.sources.values()):
            raise ValueError("sources names none that is not null")
        self.check_fields()
        if min(self.window, self.mixing_period, self.max_sample_bytes, self.prefetch) < 1 or self.num_workers < 0:
            raise ValueError(
                "window, mixing_period, max_sample_bytes and prefetch must be positive, num_workers not negative"
            )
        if self.buckets is not None and not (self.buckets and all(len(b) == 2 and min(b) > 0 for b in self.buckets)):
            raise ValueError(f"buckets is a list of [height, width], not {self.buckets}")

    @cached_property
    def by_source(self) -> dict[str, list[Shard]]:
        """The shards of each source; UserError if there are none."""
        chosen = self.sources if self.sources is not None else {"shards": Source(self.shards)}
        found = {}
        for name, source in chosen.items():
            if source is not None:
                shards = self.store.find(*_listed(source.shards))
                found[name] = list({shard.url: shard for shard in shards}.values())  # two patterns may name the same
                if not shards:
                    raise UserError(f"data: source {name} names no shards")
        return found

    @cached_property
    def samples(self) -> Samples:
        return Samples([s for shards in self.by_source.values() for s in shards], self.store, self.max_sample_bytes)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([shard.samples for shard in self.samples.shards])

    @property
    def image_shapes(self) -> list[tuple[int, ...]]:
        image = self.entries["image"]
        shapes = [image.shaped(*shape) for shape in self.buckets or ()]
        return [tuple(image.present(torch.empty(1, *s, device="meta")).shape[1:]) for s in shapes] or [self.image_shape]

    def numbered(self) -> "ShardData":
        return self

    @property
    def count(self) -> int:
        return int(self._ends[-1])

    @property
    def fingerprint(self) -> str:
        known = {
            name: [(shard.url.rpartition("/")[2], shard.samples, shard.crc32) for shard in shards]
            for name, shards in self.by_source.items()
        }
        sizes = [shard.sizes for shard in self.samples.shards] if self.buckets else []
        return blake2b(repr((known, sizes) if sizes else known).encode(), digest_size=16).hexdigest()

    def loader(self, layout: Layout, seed: int, lanes: int, first_step: int, last_step: int) -> Loader:
        items = range(first_step * layout.micro_batches, last_step * layout.micro_batches)
        firsts = np.cumsum([0, *(len(shards) for shards in self.by_source.values())])[:-1]
        reader = Reader(self.samples, self.decoder, self._stream(seed, lanes, layout.batch_size), firsts, seed)
        source, shapes = partial(Items, reader, layout), self.buckets or (None,)
        return Loader(source, self.decoder, layout, items, self.num_workers, self.prefetch, shapes)

    def _stream(self, seed: int, lanes: int, batch_size: int) -> Mix | Bucketed:
        weights = [self.sources[name].weight for name in self.by_source] if self.sources else [1.0]
        if self.buckets:
            assigned = {name: [self._buckets_of(s) for s in shards] for name, shards in self.by_source.items()}
            return bucketed(assigned, weights, self.buckets, batch_size, self.mixing_period, seed, lanes, self.window)
        orders = [
            Order(np.array([shard.samples for shard in shards]), seed, name, lanes, self.window)
            for name, shards in self.by_source.items()
        ]
        return Mix(orders, in_proportion(weights, self.mixing_period), self.mixing_period)

    def _buckets_of(self, shard: Shard) -> np.ndarray:
        if shard.sizes is None:
            raise UserError(
                f"data.buckets: the index has no sizes of the images in {shard.url}; make it: {remedy(shard, True)}"
            )
        data = self.store.sidecar(shard, SIZES)
        if len(data) != 8 * shard.samples or not shard.fits(SIZES, data):
            raise stale(shard)
        return nearest(np.frombuffer(data, "<u4").reshape(-1, 2), self.buckets).astype(np.uint8)

    def place(self, i: int) -> tuple[int, int]:
        """Shard and sample in it of sample i of the set, in the order of the shards."""
        k = int(np.searchsorted(self._ends, i, "right"))
        return k, i - int(self._ends[k]) + self.samples.shards[k].samples

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Samples of the set; UserError names the shard if one is damaged."""
        arrays = [np.empty(entry.shape, entry.dtype) for entry in self.decoder.entries(len(indices))]
        objects = self._fill(self.decoder, indices, arrays)
        return self.decoder.batch([torch.from_numpy(array) for array in arrays], objects)

    def _fill(self, decoder: Decoder, indices: Sequence[int], arrays: Sequence[np.ndarray]) -> dict[str, list]:
        places = [self.place(i) for i in indices]

        def failed(row: int, damage: Damage) -> None:
            k, sample = places[row]
            shard = self.samples.shards[k].url
            raise Unusable(f"shard {shard}, sample {sample} ({damage.kind}): {damage}") from damage

        return decoder.fill(arrays, Draws(0, indices), lambda row: self.samples.read(*places[row]), failed)

    def labelled(self, label: int) -> Iterator[int]:
        """Numbers of the samples of a class, in the order of the shards; their images are not decoded."""
        decoder = Decoder({"label": self.entries["label"]})
        value = np.empty(1, np.int64)
        for i in range(self.count):
            self._fill(decoder, [i], [value])
            if value[0] == label:
                yield i

    def first(self, count: int) -> dict[str, Any]:
        if not self.count:
            raise UserError("data.shards: there are no samples in them")
        usable, why = [], None
        for i in range(min(count, self.count)):
            try:
                self.batch([i])
                usable.append(i)
            except Unusable as damaged:  # it will be replaced and counted when it comes
                why = why or damaged
        if not usable:
            raise UserError(f"none of the first {min(count, self.count)} samples can be used: {why}")
        return self.batch(usable)

    def once(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[dict[str, Any]]:
        """Every sample once, in the order of the shards, dealt over the ranks; the last batch may be short."""
        mine = range(rank, self.count, world)
        for first in range(0, len(mine), batch_size):
            yield self.batch(mine[first : first + batch_size])


class Unusable(UserError):
    """A damaged sample that was asked for by its number."""


def _listed(patterns: str | Sequence[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns
