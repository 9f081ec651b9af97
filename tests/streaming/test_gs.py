"""gs:// through gcsfs itself, over HTTP on loopback: samples are those of the files, or damage, or the run stops."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from streaming import flaky
from streaming.flaky import Handler, serving
from streaming.making import shard_bytes, shard_data, whole, write_set

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.cached import CachedStore
from diffusion_trainer.streaming.index import INDEX, read_index
from diffusion_trainer.streaming.indexing import index
from diffusion_trainer.streaming.remote import Remote
from diffusion_trainer.streaming.retries import Retries
from diffusion_trainer.streaming.sites import RemoteSite

if find_spec("gcsfs") is None:
    pytest.skip("gcsfs is not installed (pip install 'diffusion-trainer[gcs]')", allow_module_level=True)

COUNTS = [9, 1, 30, 0, 12, 17]
MODES = pytest.mark.parametrize("piece_bytes", [None, 4096], ids=["whole", "pieces"])
ROOT = "/storage/v1/b/bucket/o"


class Google(Handler):
    """As much of the JSON API (version 1) as reading, listing and writing objects takes. The server's script and
    `always` are of downloads."""

    def do_GET(self):
        url = urlsplit(self.path)
        name = unquote(url.path)
        if name.startswith(f"/download{ROOT}/"):
            self.path = name.removeprefix(f"/download{ROOT}")
            return super().do_GET()
        if name == ROOT:
            return self._json(200, {"items": self._listed(parse_qs(url.query))})
        key = name.removeprefix(ROOT)
        if key in self.server.files:
            return self._json(200, self._about(key))
        return self._json(404, {"error": {"code": 404, "message": "no such object"}})

    def do_POST(self):
        """A resumable upload: the first request names the object, the second one brings it."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = unquote(self.path).removeprefix("/session")
        if key == unquote(self.path):
            return self.send(200, b"", Location=f"{self.server.url}/session/{json.loads(body)['name']}")
        self.server.files[key] = body
        return self._json(200, self._about(key))

    def _listed(self, query: dict[str, list[str]]) -> list[dict]:
        prefix = query.get("prefix", [""])[0]
        return [self._about(key) for key in sorted(self.server.files) if key[1:].startswith(prefix)]

    def _about(self, key: str) -> dict:
        return {"name": key[1:], "bucket": "bucket", "size": str(len(self.server.files[key])), "generation": "1"}

    def _json(self, code: int, value: dict):
        self.send(code, json.dumps(value).encode(), Content_Type="application/json")


@pytest.fixture
def folder(tmp_path) -> Path:
    write_set(tmp_path / "set", COUNTS)
    return tmp_path / "set"


@pytest.fixture
def google(monkeypatch):
    """A store whose objects lie under set/. gcsfs' own waits (a minute in all) are left out, its tries are not."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    async def at_once(seconds: float) -> None:
        return None

    with serving() as server:
        server.RequestHandlerClass = Google
        Remote(20.0, options_of(server))._system("gs://bucket/x")  # what imports gcsfs says what it is to do without
        monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=at_once))
        yield server


@pytest.fixture
def filled(google, folder):
    google.files = {f"/set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    return google


@pytest.fixture
def make(google, tmp_path):
    def store(piece_bytes: int | None = None, **options) -> CachedStore:
        chosen = {"retries": 3, "backoff_seconds": 0.001, "timeout_seconds": 20.0, "cache_bytes": 1 << 20, **options}
        return CachedStore(
            str(tmp_path / "cache"), piece_bytes=piece_bytes, storage_options=options_of(google), **chosen
        )

    return store


def options_of(google) -> dict:
    return {"token": "anon", "endpoint_url": google.url}


def read(shards: str, store: CachedStore | None = None, workers: int = 0):
    """Global batches of more than an epoch."""
    chosen = {} if store is None else {"store": store}
    return whole(shard_data(shards, window=6, damage_budget=0.9, num_workers=workers, **chosen), 8, range(3, 15))


def kinds(found: list) -> list[tuple[str, str, int]]:
    return [(f.kind, f.shard.rpartition("/")[2], f.sample) for f in found]


@MODES
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pattern", ["*.tar", "x-{000..005}.tar"])
def test_global_batches_are_those_of_the_files(pattern, workers, piece_bytes, filled, folder, make):
    assert read(f"gs://bucket/set/{pattern}", make(piece_bytes), workers) == read(f"{folder}/*.tar")


def test_folders_are_globbed(filled, folder, make):
    filled.files |= {name.replace("/set/", "/other/"): data for name, data in filled.files.items()}
    found = make().find("gs://bucket/*/x-000.tar")
    assert [shard.url for shard in found] == ["gs://bucket/other/x-000.tar", "gs://bucket/set/x-000.tar"]


ILL = {
    "503": flaky.status(503),
    "429": flaky.status(429),
    "500": flaky.status(500),
    "502": flaky.status(502),
    "reset": flaky.reset,
    "short read": flaky.short,
    "half": flaky.half,
    "empty": flaky.empty,
    "html": flaky.page,
    "longer": flaky.longer,
    "flipped": flaky.flipped,
    "404": flaky.missing,
}


@MODES
@pytest.mark.parametrize("kind", ILL)
def test_an_illness_that_passes_changes_no_sample(kind, piece_bytes, filled, folder, make):
    if kind == "flipped" and piece_bytes:
        pytest.skip("of a piece there is no checksum; a flipped bit costs the samples that it is in")
    for name in ("x-000.tar", "x-002.tar.idx", "x-004.tar.crc", INDEX):
        filled.script[f"/set/{name}"] = [ILL[kind]]
    assert read("gs://bucket/set/*.tar", make(piece_bytes)) == read(f"{folder}/*.tar")
    assert not filled.script["/set/x-000.tar"]


@MODES
@pytest.mark.parametrize("kind", ["503", "reset", "short read", "html", "empty"])
def test_a_store_that_stays_ill_stops_the_run(kind, piece_bytes, filled, make):
    store = make(piece_bytes)
    shard = store.find("gs://bucket/set/*.tar")[0]
    filled.always["/set/x-000.tar"] = ILL[kind]
    with pytest.raises(PassingError, match=r"gs://bucket/set/x-000.tar cannot be had: .*tried 4 times"):
        store.read(shard, 0, memoryview(bytearray(100)))
    del filled.always["/set/x-000.tar"]
    store.read(shard, 0, memoryview(bytearray(100)))


@MODES
@pytest.mark.parametrize("code", [401, 403])
def test_credentials_that_are_refused_are_told(code, piece_bytes, filled, make):
    store = make(piece_bytes)
    shard = store.find("gs://bucket/set/*.tar")[0]
    filled.always["/set/x-000.tar"] = flaky.status(code)
    with pytest.raises(UserError, match="check the credentials"):
        store.read(shard, 0, memoryview(bytearray(100)))
    assert filled.count("/set/x-000.tar") == 1


@MODES
@pytest.mark.filterwarnings("ignore:the cache .* is too small")
def test_damage_is_that_of_the_files(piece_bytes, folder, filled, make):
    """A shard missing, one cut, one flipped."""
    (folder / "x-004.tar").unlink()
    (folder / "x-002.tar").write_bytes((folder / "x-002.tar").read_bytes()[:20000])
    data = bytearray((folder / "x-005.tar").read_bytes())
    data[3000] ^= 1
    (folder / "x-005.tar").write_bytes(data)
    filled.files = {f"/set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    expected = read(f"{folder}/*.tar")
    found = read("gs://bucket/set/*.tar", make(piece_bytes))
    assert {f.kind for f in found.found} == {"missing_shard", "truncated", "checksum"}
    assert kinds(found.found) == kinds(expected.found)
    assert np.array_equal(found.samples, expected.samples)
    assert np.array_equal(found.labels, expected.labels)


@MODES
def test_a_shard_that_was_written_again_stops_the_run(piece_bytes, filled, make):
    filled.files["/set/x-000.tar"] = shard_bytes(range(40))
    store = make(piece_bytes)
    shard = store.find("gs://bucket/set/x-000.tar")[0]
    with pytest.raises(UserError, match="it was written again"):
        store.read(shard, 0, memoryview(bytearray(shard.size)))


def sites(google, folder: Path) -> list[RemoteSite]:
    remote, retries = Remote(20.0, options_of(google)), Retries(3, 0.001)
    return [RemoteSite(f"gs://bucket/set/{path.name}", remote, retries) for path in sorted(folder.glob("*.tar"))]


def test_the_index_is_written_beside_the_shards(google, folder, tmp_path):
    """The same bytes as of the files, and what is indexed is not fetched again; what lacks a file is."""
    google.files = {f"/set/{path.name}": path.read_bytes() for path in folder.glob("*.tar")}
    report = index(sites(google, folder), 1)
    assert (len(report.shards), report.known, report.damaged) == (len(COUNTS), 0, {})
    assert google.files == {f"/set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    google.requests.clear()
    assert index(sites(google, folder), 1).known == len(COUNTS)
    assert not any(name.endswith(".tar") and method == "GET" for method, name in google.requests if "/o" not in name)
    for name in ("x-001.tar.idx", "x-002.tar.crc"):
        del google.files[f"/set/{name}"]
    assert index(sites(google, folder), 1).known == len(COUNTS) - 2
    (tmp_path / INDEX).write_bytes(google.files[f"/set/{INDEX}"])
    assert read_index(tmp_path / INDEX) == read_index(folder / INDEX)
