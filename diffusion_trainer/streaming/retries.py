"""What is tried again because storage is ill today, how long, and what is said in the end."""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import count
from random import SystemRandom
from typing import TypeVar

from diffusion_trainer.conventions import PassingError

LONGEST_WAIT_SECONDS = 60.0
LONGEST_SECONDS = 900.0  # after the first try none begins: one may take long, too
LONGEST_ASKED_SECONDS = 300.0  # a store that wants more (Retry-After) is down
AGAIN = "What was done stands: once it can be read, run the same command again"  # whatever the verb
_JITTER = SystemRandom()  # forked workers would share the state of any other, and all come back at the same moment

Result = TypeVar("Result")


class Sick(Exception):
    """The store did not give what it has: worth another try. The message says what came instead."""

    def __init__(self, message: str, asked_seconds: float = 0.0):
        super().__init__(message)
        self.asked_seconds = asked_seconds  # how long the store wants us to stay away


class Twice:
    """Believes an answer that looks wrong when it comes again: said twice it is a fact, said once it may be the day."""

    def __init__(self):
        self._seen: set[Hashable] = set()

    def __call__(self, answer: Hashable, message: str) -> None:
        """Sick with the message, the first time."""
        if answer not in self._seen:
            self._seen.add(answer)
            raise Sick(message)


@dataclass(frozen=True)
class Retries:
    """Tries again up to `count` times, waiting uniform(0, backoff_seconds 2^k) before the k-th, at most a minute each.
    No try begins later than a quarter of an hour after the first.

    Exponential backoff with full jitter: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    count: int
    backoff_seconds: float

    def __post_init__(self):
        if self.count < 0 or not self.backoff_seconds >= 0:
            raise ValueError(f"retries={self.count} and backoff_seconds={self.backoff_seconds} must not be negative")

    def __call__(self, url: str, attempt: Callable[[], Result]) -> Result:
        """Its result; PassingError once it was Sick too often. What else it raises passes."""
        begin = time.monotonic()
        for tries in count(1):
            try:
                return attempt()
            except Sick as sick:
                seconds, wait = time.monotonic() - begin, sick.asked_seconds + self._wait(tries - 1)
                late = sick.asked_seconds > LONGEST_ASKED_SECONDS or seconds + wait > LONGEST_SECONDS
                if tries > self.count or late:
                    raise PassingError(
                        f"{url} cannot be had: {sick} (tried {tries} times in {seconds:.0f} s). {AGAIN}"
                    ) from sick
                time.sleep(wait)

    def _wait(self, tries: int) -> float:
        return _JITTER.uniform(0.0, min(self.backoff_seconds * 2.0 ** min(tries, 32), LONGEST_WAIT_SECONDS))
