"""Shards with odd names, behind odd servers, at odd times."""

import errno
import gzip
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest
from streaming import flaky
from streaming.flaky import PAGE, Handler, serving
from streaming.making import write_set
from streaming.stores import contents
from streaming.three_shards import server  # noqa: F401 (a fixture)

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming import stores as local
from diffusion_trainer.streaming.cache import Cache
from diffusion_trainer.streaming.cached import CachedStore
from diffusion_trainer.streaming.index import INDEX, read_index
from diffusion_trainer.streaming.indexing import index
from diffusion_trainer.streaming.remote import Gone, Remote
from diffusion_trainer.streaming.retries import AGAIN, Retries
from diffusion_trainer.streaming.sites import RemoteSite
from diffusion_trainer.streaming.stores import LocalStore

ODD = ["a b", "ä中", "50%", "h#i", "q?r", "[x]", "{y}", "p+q~"]
NAMES = ["x-000.tar", "x-001.tar"]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_set(tmp_path / "set", [3, 2])
    return tmp_path / "set"


@pytest.fixture
def make(tmp_path) -> Callable[..., CachedStore]:
    chosen = {"retries": 3, "backoff_seconds": 0.001, "timeout_seconds": 20.0}
    return partial(CachedStore, str(tmp_path / "cache"), 1 << 20, **chosen)


@pytest.mark.parametrize("name", ODD)
def test_folders_may_have_any_name(name, tmp_path, folder, make):
    write_set(tmp_path / name, [3, 2])
    truth = contents(LocalStore(), f"{folder}/*.tar")
    assert contents(LocalStore(), f"{tmp_path}/{name}/*.tar") == truth
    assert contents(make(), f"file://{tmp_path}/{name}/*.tar") == truth
    with serving() as server:
        server.files = {f"/{quote(name)}/{p.name}": p.read_bytes() for p in folder.iterdir()}
        assert contents(make(), f"{server.url}/{quote(name)}/*.tar") == truth


def test_links_are_what_they_lead_to(tmp_path, folder):
    truth = contents(LocalStore(), f"{folder}/*.tar")
    (tmp_path / "links").mkdir()
    for path in folder.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    (tmp_path / "link").symlink_to(folder)
    for name in ("links", "link"):
        assert contents(LocalStore(), f"{tmp_path}/{name}/*.tar") == truth
    (folder / NAMES[1]).unlink()
    assert contents(LocalStore(), f"{tmp_path}/links/*.tar") == [*truth[:3], b"missing_shard", b"missing_shard"]


@pytest.mark.parametrize("pattern", ["x-{000..001.tar", "x-}.tar", "{x-000.tar"])
def test_a_brace_without_partner_is_told(pattern, folder, server, make):
    for find, place in ((LocalStore().find, str(folder)), (make().find, server.url)):
        with pytest.raises(UserError, match="has no partner"):
            find(f"{place}/{pattern}")


def test_a_pattern_of_folders_may_name_files_too(tmp_path, folder):
    write_set(folder / "deep", [1], name="y")
    found = LocalStore().find(f"{tmp_path}/**/*.tar")
    assert [Path(shard.url).name for shard in found] == [*NAMES, "y-000.tar"]
    with pytest.raises(UserError, match="no file matches"):
        LocalStore().find(f"{folder}/{NAMES[0]}/*.tar")


def test_a_folder_that_cannot_be_listed_is_a_file_system_that_is_ill(folder, monkeypatch):
    def ill(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "listdir", ill)
    monkeypatch.setattr(local, "RETRIES", Retries(3, 0.0))
    with pytest.raises(PassingError, match=f"tried 4 times.*{AGAIN}"):
        LocalStore().find(f"{folder}/*.tar")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP])
def test_what_waiting_does_not_mend_is_the_users_to_mend(number, folder, monkeypatch):
    def refused(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(UserError, match=f"{folder} cannot be read") as told:
        LocalStore().find(f"{folder}/*.tar")
    assert not isinstance(told.value, PassingError)


class Redirecting(Handler):
    def do_GET(self):
        if not self.path.startswith("/old"):
            return super().do_GET()
        return self.send(302, b"", Location=f"{self.server.url}{self.path.removeprefix('/old')}")


class Compressing(Handler):
    """Whatever the client accepts, and as if there were no ranges."""

    def do_GET(self):
        self.send(200, gzip.compress(self.server.files[self.path]), Content_Encoding="gzip")


@pytest.mark.parametrize("piece_bytes", [None, 2048])
def test_redirections_are_followed(piece_bytes, folder, server, make):
    server.RequestHandlerClass = Redirecting
    truth = contents(LocalStore(), f"{folder}/*.tar")
    assert contents(make(piece_bytes=piece_bytes), f"{server.url}/old/*.tar") == truth


def test_a_server_that_compresses_unasked_changes_no_sample(folder, server, make):
    server.RequestHandlerClass = Compressing
    assert contents(make(), f"{server.url}/*.tar") == contents(LocalStore(), f"{folder}/*.tar")


def test_a_page_in_place_of_the_index_is_a_store_that_is_ill(server, make):
    server.always[f"/{INDEX}"] = flaky.page
    with pytest.raises(PassingError, match=r"no index: .*<!DOCTYPE.*tried 4 times"):
        make().find(f"{server.url}/*.tar")


def sites(url: str, out: Path | None = None) -> list[RemoteSite]:
    return [RemoteSite(f"{url}/{name}", Remote(20.0), Retries(3, 0.001), out) for name in NAMES]


@pytest.mark.parametrize("ill", [flaky.half, flaky.page, flaky.empty, flaky.longer, flaky.short, flaky.status(503)])
def test_an_index_of_an_ill_store_is_that_of_the_files(ill, server, folder, tmp_path):
    for name in NAMES:
        server.script[f"/{name}"] = [ill]
    assert not index(sites(server.url, tmp_path / "out"), 1).damaged
    assert read_index(tmp_path / "out" / INDEX) == read_index(folder / INDEX)
    for name in NAMES:
        for suffix in (".idx", ".crc"):
            assert (tmp_path / "out" / f"{name}{suffix}").read_bytes() == (folder / f"{name}{suffix}").read_bytes()


def test_a_store_that_takes_no_index_is_told_with_the_remedy(server, folder):
    for name in (INDEX, f"{NAMES[0]}.idx"):
        del server.files[f"/{name}"]
    with pytest.raises(UserError, match=r"x-000.tar.idx cannot be written .*out=\.\.\."):
        index(sites(server.url), 1)


@pytest.mark.parametrize(
    ("error", "said", "tries"),
    [
        (PermissionError("no"), r"cannot be written .*out=", 1),
        (FileNotFoundError("no bucket"), r"cannot be written .*out=", 1),
        (Exception("an error of its own"), r"cannot be had: .*tried 4 times", 4),
    ],
)
def test_whatever_a_store_says_when_it_is_written_to_is_told(error, said, tries, monkeypatch):
    """Google's library has exceptions that are no OSError."""
    opened = []

    def ill(self, path, mode="rb", **options):
        opened.append(mode)
        raise error

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "_open", ill)
    with pytest.raises(UserError, match=said) as told:
        RemoteSite("memory://d/x.tar", Remote(20.0), Retries(3, 0.001)).put("x.tar.idx", b"1")
    assert isinstance(told.value, PassingError) == (tries > 1)
    assert opened == ["wb"] * tries


def test_a_shard_that_is_not_there_is_not_indexed(server, tmp_path):
    del server.files[f"/{NAMES[1]}"]
    with pytest.raises(Gone):
        index(sites(server.url, tmp_path), 1)
    assert [shard.url for shard in read_index(tmp_path / INDEX)] == NAMES[:1]


def test_a_shard_that_is_a_page_is_left_out(server, tmp_path):
    server.files[f"/{NAMES[1]}"] = PAGE
    assert list(index(sites(server.url, tmp_path), 1).damaged) == [f"{server.url}/{NAMES[1]}"]
    assert [shard.url for shard in read_index(tmp_path / INDEX)] == NAMES[:1]


def test_what_a_wrong_clock_dated_in_the_future_is_removed_first(tmp_path):
    """Else it would stay, and what is fetched from then on would have to do with the rest of the cache."""
    cache = Cache(tmp_path, 1000)
    for k in range(8):
        os.close(cache.open(f"e{k}", 100, lambda path: path.write_bytes(bytes(100))))
    for k, ahead in ((2, 3600), (5, 10**9), (1, 30)):  # half a minute is no error
        os.utime(cache.entries / f"e{k}", (time.time() + ahead,) * 2)
    os.close(cache.open("new", 400, lambda path: path.write_bytes(bytes(400))))
    assert {path.name for path in cache.entries.iterdir()} == {"e0", "e1", "e3", "e4", "e6", "e7", "new"}
