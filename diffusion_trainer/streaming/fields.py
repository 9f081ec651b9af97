"""The seam of fields: one entry of a batch, from one member of each sample."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from diffusion_trainer.conventions import seed_of
from diffusion_trainer.streaming.columns import Block, Column, member_of
from diffusion_trainer.streaming.damage import Damage
from diffusion_trainer.streaming.ring import Entry


class SampleDraws(NamedTuple):
    """Random numbers of augmentations: functions of (seed, sample number), whoever decodes the sample."""

    seed: int
    number: int  # of the sample in the endless stream

    def uniform(self, stream: str) -> float:
        """In [0, 1). The same stream gives the same number again."""
        return seed_of(self.seed, "augmentation", self.number, stream) / 2**63


class Draws(NamedTuple):
    """Of samples with these numbers: most fields ask for none, so that they are made when they are asked for."""

    seed: int
    numbers: Sequence[int]

    def of(self, row: int) -> SampleDraws:
        return SampleDraws(self.seed, self.numbers[row])


class Field(ABC):
    """How a member's bytes become an entry of the batch. Frozen dataclasses; none can run code from the data."""

    @property
    @abstractmethod
    def extensions(self) -> tuple[str, ...]:
        """Of the member that holds it, lower case, in order of preference."""

    @property
    @abstractmethod
    def stored(self) -> tuple[int, ...] | None:
        """Shape of one sample in the batch's buffer; None for a Python object (text), of which a batch has a list."""

    def shaped(self, height: int, width: int) -> tuple[int, ...] | None:
        """`stored` in batches of an aspect bucket; for a field that has no height and width, what it always is."""
        return self.stored

    @property
    @abstractmethod
    def dtype(self) -> np.dtype | None:
        """Of the buffer; None for a Python object."""

    @abstractmethod
    def decode(self, data: memoryview, out: np.ndarray | None, draws: SampleDraws) -> Any:
        """Fills `out`, in the shape that `out` has (aspect buckets vary it), or returns the object. Raises Damage.

        The data are overwritten after it has returned: what is kept of them is a copy.
        """

    def decode_all(self, column: Column, out: np.ndarray | None, draws: Draws) -> list:
        """`decode` for each member of a column, out being (n, *shape); Damage if any of them has some."""
        rows = range(len(column))
        return [self.decode(column[row], None if out is None else out[row, ...], draws.of(row)) for row in rows]

    def damaged(self, rows: np.ndarray) -> Mapping[int, Damage]:
        """Of rows, (n, *shape), that `decode` has filled: what costs less to see in all at once."""
        return {}

    def present(self, batch: Tensor) -> Tensor:
        """(B, *stored) -> the batch's entry as the model takes it; a view."""
        return batch


class Decoder:
    """Members of a sample -> its row of each array of a batch, and its objects."""

    def __init__(self, fields: Mapping[str, Field]):
        self.fields = fields
        self._arrays = [field for field in fields.values() if field.stored is not None]
        self._objects = {name: field for name, field in fields.items() if field.stored is None}

    def entries(self, size: int, shape: Sequence[int] | None = None) -> list[Entry]:
        """The arrays of a batch of `size` samples; shape: height and width of its aspect bucket."""
        shapes = [field.shaped(*shape) if shape else field.stored for field in self._arrays]
        return [Entry((size, *stored), np.dtype(f.dtype)) for stored, f in zip(shapes, self._arrays, strict=True)]

    def fill(
        self,
        arrays: Sequence[np.ndarray],
        draws: Draws,
        read: Callable[[int], Mapping[str, memoryview]],
        failed: Callable[[int, Damage], None],
        read_block: Callable[[int], Block] | None = None,
    ) -> dict[str, list]:
        """Fills arrays, each (n, *stored), n being the number of draws; returns n objects of each field without array.

        read(row) gives the members of the row's sample, and after failed(row, damage) those of another in its place;
        whoever has none raises there. read_block(row): as many of the rows from this one on as can be had at once, none
        if it is damaged.
        """
        objects = {name: [None] * len(draws.numbers) for name in self._objects}
        # Not looked up for each sample.
        into = [(field.decode, field.extensions, array) for field, array in zip(self._arrays, arrays, strict=True)]
        rows: Sequence[int] = range(len(draws.numbers))
        if read_block is not None:
            rows = self._fill_blocks(rows, arrays, objects, draws, read_block)
        while rows:
            for row in rows:
                self._fill_row(row, into, objects, draws.of(row), read, failed)
            found: dict[int, Damage] = {}
            for field, array in zip(self._arrays, arrays, strict=True):
                found = {**field.damaged(array), **found}
            rows = sorted(found)
            for row in rows:
                failed(row, found[row])
        return objects

    def _fill_blocks(self, rows, arrays, objects, draws, read_block) -> list[int]:
        """Returns the rows that are left to be read one by one, as something in their block is damaged."""
        left, at = [], 0
        while at < len(rows):
            block = read_block(at)
            some = rows[at : at + max(1, len(block))]
            if not (len(block) and self._fill_block(block, slice(some.start, some.stop), arrays, objects, draws)):
                left += some
            at = some.stop
        return left

    def _fill_block(self, block, rows, arrays, objects, draws) -> bool:
        draws = Draws(draws.seed, draws.numbers[rows])
        try:
            for field, array in zip(self._arrays, arrays, strict=True):
                field.decode_all(block.column(field.extensions), array[rows], draws)
                if field.damaged(array[rows]):
                    return False
            for name, field in self._objects.items():
                objects[name][rows] = field.decode_all(block.column(field.extensions), None, draws)
        except Damage:
            return False
        return True

    def _fill_row(self, row, into, objects, draws, read, failed) -> None:
        while True:
            try:
                members = read(row)
                for decode, extensions, array in into:
                    decode(member_of(members, extensions), array[row, ...], draws)
                for name, field in self._objects.items():
                    objects[name][row] = field.decode(member_of(members, field.extensions), None, draws)
                return
            except Damage as damage:
                failed(row, damage)

    def batch(self, arrays: Sequence[Tensor], objects: Mapping[str, list]) -> dict[str, Any]:
        """Entries in the order of the fields, as the model takes them."""
        tensors = iter(arrays)
        return {
            name: objects[name] if field.stored is None else field.present(next(tensors))
            for name, field in self.fields.items()
        }
