"""Some samples that lie in one piece of memory, and one member of each of them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffusion_trainer.streaming.cutter import Places
from diffusion_trainer.streaming.damage import MissingField


class Column(NamedTuple):
    """The same member of each of some samples."""

    memory: memoryview
    starts: Sequence[int]
    ends: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> memoryview:
        return self.memory[self.starts[row] : self.ends[row]]

    def strides(self) -> tuple[int, int] | None:
        """Bytes from one to the next, and of each, if these are the same for all."""
        starts, n = self.starts, len(self.starts)
        step, size = (starts[1] - starts[0] if n > 1 else 1), self.ends[0] - starts[0]
        even = starts == [*range(starts[0], starts[0] + n * step, step)] and self.ends == [s + size for s in starts]
        return (step, size) if even else None


class Block(NamedTuple):
    """Some samples, in memory that is theirs until the next block is read."""

    memory: memoryview
    starts: Sequence[int]  # of each sample
    places: Sequence[Places]  # of the members in each sample

    def __len__(self) -> int:
        return len(self.starts)

    def column(self, extensions: Sequence[str]) -> Column:
        """The first of these that a sample has, of each. MissingField if one has none."""
        found = [(at, member_of(places, extensions)) for at, places in zip(self.starts, self.places, strict=True)]
        return Column(self.memory, [at + start for at, (start, _) in found], [at + end for at, (_, end) in found])


def member_of(members: Mapping, extensions: Sequence[str]):
    """What the members of a sample have under the first of these extensions that is there; MissingField for none."""
    for extension in extensions:
        if extension in members:
            return members[extension]
    raise MissingField(
        f"it has no .{' or .'.join(extensions)}, only {', '.join('.' + e for e in sorted(members)) or 'nothing'}"
    )
