"""data=webdataset from s3:// and gs://, through their own clients: as from http (test_streams.py)."""

import pytest
from streaming.stores import ILL
from streaming.test_object_stores import cloud, filled, kind, originals, server  # noqa: F401 (fixtures)

from diffusion_trainer.conventions import PassingError
from diffusion_trainer.streaming.remote import Gone, Remote
from diffusion_trainer.streaming.retries import Retries
from diffusion_trainer.streaming.streams import samples

FIRST = "/set/x-000.tar"


def contents(remote: Remote, url: str) -> list:
    return list(samples(remote, Retries(3, 0.001), url, ("cls", "npy"), 1 << 20))


@pytest.fixture
def remote(kind, server) -> Remote:
    return Remote(20.0, kind.options(server.url))


@pytest.mark.parametrize("sick", ["none", "503", "500", "reset", "short read", "html", "empty", "half", "404"])
def test_an_illness_that_passes_changes_no_sample(sick, kind, filled, originals, remote):
    truth = contents(Remote(20.0), str(originals / "x-000.tar"))
    assert len(truth) == 9
    filled.script[FIRST] = [ILL[sick]] if sick in ILL else []
    assert contents(remote, f"{kind}://bucket{FIRST}") == truth
    assert not filled.script[FIRST]


@pytest.mark.parametrize("sick", ["503", "reset", "short read", "html", "empty"])
def test_a_store_that_stays_ill_stops_the_run(sick, kind, filled, remote):
    filled.always[FIRST] = ILL[sick]
    with pytest.raises(PassingError, match=r"x-000.tar cannot be had: .*tried 4 times"):
        contents(remote, f"{kind}://bucket{FIRST}")


def test_an_object_that_is_not_there_is_gone(kind, filled, remote):
    with pytest.raises(Gone):
        contents(remote, f"{kind}://bucket/set/nothing.tar")
