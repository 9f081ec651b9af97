"""Fetching in the background what will be read soon."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from queue import Full, Queue

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.remote import Gone

MAX_QUEUED = 1024
LATELY_SECONDS = 60.0  # what was asked for is not asked for again so soon
MAX_REMEMBERED = 1 << 16


class Prefetcher:
    """Threads of this process that fetch. A forked child has none of them and needs a Prefetcher of its own.

    They are daemons: an interpreter that ends does not wait for a transfer, whose remains the next process removes.
    """

    def __init__(self, fetch: Callable[[Hashable], None], threads: int):
        self._fetch, self._queue = fetch, Queue(MAX_QUEUED)
        self._lately: OrderedDict[Hashable, float] = OrderedDict()
        for k in range(threads):
            threading.Thread(target=self._work, name=f"prefetch-{k}", daemon=True).start()

    def __call__(self, things: Iterable[Hashable]) -> None:
        """Returns at once. What does not fit into the queue is left to who reads it."""
        now = time.monotonic()
        for thing in things:
            if now - self._lately.get(thing, -LATELY_SECONDS) < LATELY_SECONDS:
                continue
            try:
                self._queue.put_nowait(thing)
            except Full:
                return
            self._lately[thing] = now
            self._lately.move_to_end(thing)
            if len(self._lately) > MAX_REMEMBERED:
                self._lately.popitem(last=False)

    def _work(self) -> None:
        while True:
            # What goes wrong here is no news: who reads this meets it again, tries harder, and can say what it means.
            with suppress(UserError, Gone):
                self._fetch(self._queue.get())
