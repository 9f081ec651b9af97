"""How long a store that is ill is waited for."""

import time
from email.utils import formatdate
from types import SimpleNamespace

import numpy as np
import pytest
from streaming import flaky
from streaming.stores import FIRST, NAMES, contents
from streaming.three_shards import folder, make, server  # noqa: F401 (fixtures)

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming import retries
from diffusion_trainer.streaming.retries import Retries, Sick


class Sleeps(list):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def sleeps(monkeypatch) -> Sleeps:
    found = Sleeps()
    monkeypatch.setattr(retries.time, "sleep", found)
    return found


def test_waits_double_with_full_jitter_up_to_a_minute(sleeps):
    def never():
        raise Sick("no")

    with pytest.raises(UserError, match="tried 201 times"):
        Retries(200, 0.5)("u", never)
    caps = [min(0.5 * 2.0**k, 60.0) for k in range(200)]
    assert len(sleeps) == 200
    assert all(0 <= wait <= cap for wait, cap in zip(sleeps, caps, strict=True))
    shares = [wait / cap for wait, cap in zip(sleeps, caps, strict=True)]
    assert abs(np.mean(shares) - 0.5) < 6 * 12**-0.5 / 200**0.5
    assert np.std(shares) > 0.2


@pytest.mark.parametrize(("asked_seconds", "try_seconds"), [(299.0, 0.0), (0.0, 400.0), (100.0, 100.0), (0.0, 901.0)])
def test_no_try_begins_after_a_quarter_of_an_hour(asked_seconds, try_seconds, monkeypatch):
    now, begun = 0.0, []

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    def never():
        begun.append(now)
        advance(try_seconds)
        raise Sick("no", asked_seconds)

    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: now, sleep=advance))
    with pytest.raises(UserError, match=f"tried {int(900 / (asked_seconds + try_seconds)) + 1} times"):
        Retries(10, 0.001)("u", never)
    assert max(begun) <= 900


@pytest.mark.parametrize("asked", ["seconds", "date"])
def test_a_store_that_asks_for_time_gets_it(asked, sleeps, server, make):
    until = {"seconds": "7", "date": formatdate(time.time() + 9, usegmt=True)}[asked]
    server.script[FIRST] = [flaky.status(429, Retry_After=until)]
    contents(make(), f"{server.url}/{NAMES[0]}")
    assert [wait for wait in sleeps if 6 < wait < 10]


def test_a_store_that_asks_for_an_hour_is_down(sleeps, server, make):
    server.script[FIRST] = [flaky.status(503, Retry_After="3600")]
    with pytest.raises(UserError, match="tried 1 times"):
        contents(make(), f"{server.url}/{NAMES[0]}")
    assert not sleeps
