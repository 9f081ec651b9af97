"""Data of which one rank is given an error, named in a configuration through allowed_targets."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.streaming.loader import Layout, Loader


@dataclass(frozen=True)
class IllData(ShardData):
    """As ILL says, "<rank>,<item>,<passing>": an error in place of that micro-batch of that rank."""

    def loader(self, layout: Layout, *arguments: Any) -> Any:
        loader = super().loader(layout, *arguments)
        rank, item, passing = os.environ["ILL"].split(",") if "ILL" in os.environ else ("-1", "0", "")
        return _Ill(loader, int(item), bool(passing)) if layout.rank == int(rank) else loader


@dataclass(frozen=True)
class _Ill:
    inner: Loader
    at: int
    passing: bool

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for item, batch in zip(self.inner.items, self.inner, strict=True):
            if item == self.at:
                yield {"error": "the data of this rank are ill", "passing": self.passing, "damage": []}
                return
            yield batch
