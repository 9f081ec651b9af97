"""What the tests of the cache share: something to fetch from, what the accounts say, and processes to kill."""

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

from diffusion_trainer.streaming.cache import Cache


class Store:
    """Something to fetch from: entry k is k's digit, `size` times. Counts what it was asked for."""

    def __init__(self, size: int = 100):
        self.size, self.asked = size, []

    def fetch(self, name: str) -> Callable[[Path], None]:
        def into(path: Path) -> None:
            self.asked.append(name)
            path.write_bytes(name[-1].encode() * self.size)

        return into

    def read(self, cache: Cache, name: str) -> bytes:
        descriptor = cache.open(name, self.size, self.fetch(name))
        with open(descriptor, "rb") as file:
            return file.read()


def names(cache: Cache) -> set[str]:
    return {path.name for path in cache.entries.iterdir()}


def counted(cache: Cache) -> int:
    return int((cache.folder / "accounts").read_text())


def is_in_order(cache: Cache) -> bool:
    """Nothing is being fetched, and the accounts are true."""
    there = sum(path.stat().st_size for path in cache.entries.iterdir())
    return not list(cache.fetching.iterdir()) and counted(cache) == there


class Child:
    """A forked process that does some work."""

    def __init__(self, work: Callable[[], None]):
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            signal.alarm(60)
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(code)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error):
        if self.code is None:
            self.kill()

    def end(self) -> int:
        """Waits for it; 0 if nothing was raised."""
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL
