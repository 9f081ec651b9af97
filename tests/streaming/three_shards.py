"""Fixtures of the tests of shards at URLs: three shards, a server that has them, and impatient stores."""

from pathlib import Path

import pytest
from streaming.flaky import serving
from streaming.stores import contents, maker, three_shards

from diffusion_trainer.streaming.stores import LocalStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Not to be changed."""
    return three_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def truth(folder) -> list[bytes]:
    return contents(LocalStore(), str(folder / "*.tar"))


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(folder) as server:
        yield server


@pytest.fixture
def make(tmp_path):
    return maker(tmp_path)
