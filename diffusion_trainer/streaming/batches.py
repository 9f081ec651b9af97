"""From places to batches: the item is a step, so position, world size and workers are arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from diffusion_trainer.conventions import UserError, plain
from diffusion_trainer.streaming.buckets import Bucketed
from diffusion_trainer.streaming.damage import Damage, Found, Hopeless
from diffusion_trainer.streaming.fields import Decoder, Draws
from diffusion_trainer.streaming.loader import Filled, Layout, Piece, Stop
from diffusion_trainer.streaming.mixing import Mix
from diffusion_trainer.streaming.ring import Ring
from diffusion_trainer.streaming.samples import Samples

MAX_ATTEMPTS = 64  # at a sample: so many damaged ones in a row are no accident


class Reader:
    """Reads and decodes the samples of numbers, replacing damaged ones."""

    def __init__(
        self, samples: Samples, decoder: Decoder, stream: Mix | Bucketed, first_shard: Sequence[int], seed: int
    ):
        self.samples, self.decoder, self.stream, self.seed = samples, decoder, stream, seed
        self.first_shard = np.asarray(first_shard)  # of each source, in the list of all shards

    def places(self, numbers: range) -> np.ndarray:
        """(n, 2): shard and sample."""
        places = self.stream(numbers)
        return np.stack([self.first_shard[places.source] + places.shard, places.sample], 1)

    def fill(self, numbers: range, arrays: Sequence[np.ndarray]) -> Filled:
        """Decodes samples into the arrays, (n, *stored) for each array field."""
        places, bad = self.places(numbers), {}
        where = places.tolist()

        def failed(row: int, damage: Damage) -> None:
            k, i = where[row]
            tried = bad.setdefault(row, [])
            tried.append(Found(damage.kind, self.samples.shards[k].url, i, str(damage)))
            where[row] = places[row] = self._instead(numbers[row], tried)

        objects = self.decoder.fill(
            arrays,
            Draws(self.seed, numbers),
            lambda row: self.samples.read(*where[row]),
            failed,
            lambda row: self.samples.block(where[row:]),
        )
        # Those that were tried in a sample's place will be counted when their own turn comes.
        return Filled(objects, places, [bad[row][0] for row in sorted(bad)])

    def _instead(self, number: int, bad: Sequence[Found]) -> tuple[int, int]:
        """Shard and sample of the next candidate, after those that were `bad`."""
        if len(bad) > MAX_ATTEMPTS:
            last = "\n".join(f"  {f.kind}: sample {f.sample} of {plain(f.shard)}: {f.message}" for f in bad[-8:])
            raise Hopeless(f"{MAX_ATTEMPTS} samples in a row are damaged; the last ones:\n{last}", bad)
        source, shard, sample = self.stream.instead(number, len(bad) - 1)
        return int(self.first_shard[source]) + shard, sample

    def expect(self, layout: Layout, items: Sequence[int]) -> list[list[list[int]]]:
        """Tells the store which index files these items will need; returns at once, with the places of their samples,
        (shard, sample) each."""
        places = [self.places(layout.numbers(item)).tolist() for item in items]
        self.samples.expect(dict.fromkeys(k for item in places for k, _ in item))
        return places

    def look_ahead(self, layout: Layout, items: Sequence[int]) -> None:
        """Tells the store what these items will need, once it has their index files."""
        for item in self.expect(layout, items):
            self.samples.store.prefetch([self.samples.span(k, i) for k, i in item])


@dataclass
class Items(Dataset):
    """What a worker does: item k into a slot of its part of the ring."""

    reader: Reader
    layout: Layout
    ring: Ring
    started: bool = False  # whether this process has made any
    later: Sequence[int] = ()  # items that the store is to know of with the next one

    def __getitem__(self, item: int) -> Piece | Stop:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        slot, first, self.started = self.ring.take(worker), not self.started, True
        ahead = [*self.later, *self._ahead(item, workers if first else 0)]
        now, self.later = (ahead[:1], ahead[1:]) if first else (ahead, ())  # whose index files a first batch needs not
        try:
            self.reader.look_ahead(self.layout, now)
            numbers = self.layout.numbers(item)
            bucket = self.reader.stream.bucket(numbers)
            filled = self.reader.fill(numbers, self.ring.arrays(slot, bucket))
            self.reader.expect(self.layout, self.later)
            return Piece(slot, bucket, filled)
        except UserError as error:
            self.ring.give_back(slot)
            return Stop.of(error)

    def _ahead(self, item: int, first_of: int) -> list[int]:
        """What the store is to know of now: the item some steps later; of the first one of so many workers also its own
        ones before that, as nobody has told of these."""
        steps = self.reader.samples.store.steps_ahead * self.layout.micro_batches
        soon = range(item, item + steps, first_of) if first_of else ()
        return [*soon, item + steps] if steps else []
