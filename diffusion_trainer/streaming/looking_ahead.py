"""Batches that know of an error behind them."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusion_trainer.streaming.loader import Loader

ERROR_AHEAD = "error_ahead"


@dataclass(frozen=True)
class LookingAhead:
    """The loader's batches, each handed out once the `ahead` next are there: those before an error have it as
    ERROR_AHEAD. So the last step that can be taken is known as such, if a step has `ahead` of them.
    """

    loader: Loader
    ahead: int

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        waiting: deque[dict[str, Any]] = deque()
        for batch in self.loader:
            if "error" in batch:
                for one in waiting:
                    one[ERROR_AHEAD] = batch
            waiting.append(batch)
            if len(waiting) > self.ahead:
                yield waiting.popleft()
        yield from waiting
