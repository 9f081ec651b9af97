"""Samples of shards at random: one read each, checked against the index, then cut into members."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from isal import isal_zlib

from diffusion_trainer.streaming.columns import Block
from diffusion_trainer.streaming.cutter import Cutter
from diffusion_trainer.streaming.damage import BadChecksum, Damage, TooLarge, Truncated
from diffusion_trainer.streaming.index import CHECKSUMS, OFFSETS, Shard
from diffusion_trainer.streaming.stores import Store, stale
from diffusion_trainer.streaming.tar import entries, key_and_extension, members

BLOCK_BYTES = 1 << 18  # which the caches of a core hold
MAX_TABLE_BYTES = 1 << 26  # of the offsets and checksums that one process keeps, unless its lanes need more at a time
SOON = 1 << 16  # samples: lanes are fewer, an epoch of what has no room is more
PROBES = 8  # samples that are looked at to tell another shard from a damaged one


class Samples:
    """Reads sample i of shard k. The bytes it returns are valid until the next read."""

    def __init__(self, shards: Sequence[Shard], store: Store, max_bytes: int):
        self.shards, self.store, self.max_bytes = shards, store, max_bytes
        self._tables: OrderedDict[int, tuple[array, array]] = OrderedDict()
        self._table_bytes, self._max_table_bytes = 0, MAX_TABLE_BYTES
        self._reads, self._dropped = 0, {}  # of samples so far; table -> as many when it was dropped
        self._others: dict[int, bool] = {}  # of shards with damage, whether they were written again
        self._cut = Cutter()
        self._buffer = memoryview(bytearray(BLOCK_BYTES))

    def bytes_of(self, k: int, i: int) -> memoryview:
        """All of the sample as it lies in the tar. Damage if it cannot be read or is not what was indexed."""
        return self._read(k, i, 0)

    def block(self, places: Sequence[Sequence[int]]) -> Block:
        """The first of these samples, as many as fit, up to one that is damaged: whoever reads that learns of what."""
        starts, cuts, at = [], [], 0
        try:
            for k, i in places:
                data = self._read(k, i, at)
                if data is None:
                    break
                cuts.append(self._cut.places(data))
                starts.append(at)
                at += len(data)
        except Damage:
            pass
        return Block(self._buffer, starts, cuts)

    def _read(self, k: int, i: int, at: int) -> memoryview | None:
        """The sample, put into the buffer from byte `at` on; None if there is no room after others."""
        self._reads += 1
        offsets, checksums = self._table_of(k)
        first = offsets[i]
        size = offsets[i + 1] - first
        if size > self.max_bytes:
            raise TooLarge(f"it has {size} bytes, more than data.max_sample_bytes={self.max_bytes}")
        if at and at + size > BLOCK_BYTES:
            return None
        if size > len(self._buffer):
            self._buffer = memoryview(bytearray(2 * size))
        data = self._buffer[at : at + size]
        try:
            self._load(self.shards[k], first, checksums[i], data)
        except (BadChecksum, Truncated):
            if k not in self._others:
                self._others[k] = self._is_another(k, offsets, checksums)
            if self._others[k]:
                raise stale(self.shards[k]) from None
            raise
        return data

    def _load(self, shard: Shard, first: int, checksum: int, data: memoryview) -> None:
        self.store.read(shard, first, data)
        if isal_zlib.crc32(data) != checksum:
            self.store.read_again(shard, first, data)
            if isal_zlib.crc32(data) != checksum:
                raise BadChecksum("its bytes are not those that were indexed")

    def _is_another(self, k: int, offsets: array, checksums: array) -> bool:
        """Whether none of several samples is what was indexed and the shard goes on as a tar behind where its first
        one was. So it was written again, as long as before or shorter: what damages one leaves some of its samples, or
        no such beginning."""
        probes = sorted({n * (len(checksums) - 1) // (PROBES - 1) for n in range(PROBES)})
        if len(probes) < 2 or any(self._fits(k, offsets[i], offsets[i + 1], checksums[i]) for i in probes):
            return False
        lying = _Lying(self.store, self.shards[k])
        try:
            return any(entry.start >= offsets[1] for entry, _ in entries(lying, checked=True))
        except Damage:
            return False

    def _fits(self, k: int, first: int, last: int, checksum: int) -> bool:
        if last - first > self.max_bytes:
            return True  # it is not to be read, and tells nothing
        try:
            self._load(self.shards[k], first, checksum, memoryview(bytearray(last - first)))
        except (BadChecksum, Truncated):
            return False
        return True

    def read(self, k: int, i: int) -> dict[str, memoryview]:
        """Extension -> bytes."""
        return self._cut(self.bytes_of(k, i))

    def key(self, k: int, i: int) -> str:
        """The sample's name in its shard."""
        named = (key_and_extension(member.name) for member in members(self.bytes_of(k, i)))
        return next(name for name in named if name is not None)[0]

    def expect(self, shards: Iterable[int]) -> None:
        """Tells the store which shards' `span` will be asked for, so that it fetches several of their index files at a
        time."""
        self.store.prefetch_sidecars([self.shards[k] for k in shards if k not in self._tables])

    def span(self, k: int, i: int) -> tuple[Shard, int, int]:
        """Shard, first and last byte."""
        offsets, _ = self._table_of(k)
        return self.shards[k], offsets[i], offsets[i + 1]

    def _table_of(self, k: int) -> tuple[array, array]:
        table = self._tables.get(k)
        if table is None:
            return self._table(k)
        self._tables.move_to_end(k)  # the one that nobody has asked for the longest is dropped first
        return table

    def _table(self, k: int) -> tuple[array, array]:
        shard = self.shards[k]
        offsets, checksums = array("Q"), array("I")
        for numbers, suffix, count in ((offsets, OFFSETS, shard.samples + 1), (checksums, CHECKSUMS, shard.samples)):
            data = self.store.sidecar(shard, suffix)
            if len(data) != count * numbers.itemsize:
                raise stale(shard)
            if not shard.fits(suffix, data):
                raise stale(shard)  # it was written again, of the same size, and index.json is older
            numbers.frombytes(data)
        places = np.frombuffer(offsets, np.uint64)
        if offsets[-1] > shard.size or (places[1:] < places[:-1]).any():
            raise stale(shard)
        self._keep(k, offsets, checksums)
        return offsets, checksums

    def _keep(self, k: int, offsets: array, checksums: array) -> None:
        """Lanes read their shards in turns: with room for all but one of these, each sample would need a table that has
        just been dropped. Where one comes back so soon there is twice the room from then on; after an epoch it may."""
        if self._reads - self._dropped.pop(k, -SOON) < SOON:
            self._max_table_bytes *= 2
            self._dropped.clear()
        self._tables[k] = offsets, checksums
        self._table_bytes += _size(offsets, checksums)
        while self._table_bytes > self._max_table_bytes and len(self._tables) > 1:
            old, table = self._tables.popitem(last=False)
            self._table_bytes -= _size(*table)
            self._dropped[old] = self._reads


class _Lying:
    """A shard where it lies, as `entries` reads it."""

    def __init__(self, store: Store, shard: Shard):
        self.store, self.shard = store, shard

    def __len__(self) -> int:
        return self.shard.size

    def __getitem__(self, piece: slice) -> bytearray:
        data = bytearray(piece.stop - piece.start)
        self.store.read(self.shard, piece.start, memoryview(data))
        return data


def _size(*numbers: array) -> int:
    return sum(n.itemsize * len(n) for n in numbers)
