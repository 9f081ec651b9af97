"""s3:// and gs:// through their own clients, over HTTP on loopback: samples are those of the files, or damage, or the
run stops.
"""

import asyncio
import gc
import weakref
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import fsspec.asyn
import numpy as np
import pytest
from streaming import flaky
from streaming.clouds import CLOUDS, cut, says
from streaming.making import shard_bytes, shard_data, whole, write_set

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.cached import CachedStore
from diffusion_trainer.streaming.index import INDEX, read_index
from diffusion_trainer.streaming.indexing import index
from diffusion_trainer.streaming.remote import Remote
from diffusion_trainer.streaming.retries import Retries, Sick
from diffusion_trainer.streaming.sites import RemoteSite

pytestmark = pytest.mark.slow

COUNTS = [9, 1, 30, 0, 12, 17]
MODES = pytest.mark.parametrize("piece_bytes", [None, 4096], ids=["whole", "pieces"])
S3 = [kind for kind in CLOUDS if kind.scheme == "s3"]
S3_ALONE = pytest.mark.parametrize("kind", S3, indirect=True, ids=str)


@pytest.fixture(scope="module", params=CLOUDS, ids=str)
def kind(request):
    if find_spec(request.param.package) is None:
        pytest.skip(f"{request.param.package} is not installed (pip install -e '.[dev]')")
    return request.param


@pytest.fixture(scope="module")
def server(kind):
    """One of all tests: a client of S3 takes half a second to be made."""
    with kind.serving() as server:
        yield server


@pytest.fixture
def cloud(kind, server, monkeypatch, tmp_path):
    """An empty store, and a client that knows of no credentials but those of the test. The client's own waits are left
    out, its tries are not.
    """
    for kept in (server.files, server.script, server.always, server.requests, server.headers):
        kept.clear()
    server.parts.clear()
    server.checksums.clear()
    environment = {"NO_PROXY": "127.0.0.1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "none"}
    for name, value in (environment | {"AWS_SHARED_CREDENTIALS_FILE": "none"}).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)

    async def at_once(seconds: float) -> None:
        return None

    Remote(20.0, kind.options(server.url))._system(f"{kind}://bucket/x")  # what imports gcsfs says what to do without
    monkeypatch.setattr(f"{kind.waits}.asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": at_once}))
    return server


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, COUNTS)
    return folder


@pytest.fixture
def filled(cloud, originals):
    """Its objects lie under set/."""
    cloud.files |= {f"/set/{path.name}": path.read_bytes() for path in originals.iterdir()}
    return cloud


@pytest.fixture
def make(kind, server, tmp_path):
    def store(piece_bytes: int | None = None, **options) -> CachedStore:
        chosen = {"retries": 3, "backoff_seconds": 0.001, "timeout_seconds": 20.0, "cache_bytes": 1 << 20}
        chosen |= {"storage_options": kind.options(server.url), **options}
        return CachedStore(str(tmp_path / "cache"), piece_bytes=piece_bytes, **chosen)

    return store


@pytest.fixture
def sites(kind, server):
    def of(folder: Path, **options) -> list[RemoteSite]:
        remote = Remote(20.0, {**kind.options(server.url), **options})
        names = sorted(path.name for path in folder.glob("*.tar"))
        return [RemoteSite(f"{kind}://bucket/set/{name}", remote, Retries(3, 0.001)) for name in names]

    return of


def read(shards: str, store: CachedStore | None = None, workers: int = 0):
    """Global batches of more than an epoch."""
    chosen = {} if store is None else {"store": store}
    return whole(shard_data(shards, window=6, damage_budget=0.9, num_workers=workers, **chosen), 8, range(3, 15))


def kinds(found: list) -> list[tuple[str, str, int]]:
    return [(f.kind, f.shard.rpartition("/")[2], f.sample) for f in found]


def some(size: int = 100) -> memoryview:
    return memoryview(bytearray(size))


@MODES
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pattern", ["*.tar", "x-{000..005}.tar"])
def test_global_batches_are_those_of_the_files(pattern, workers, piece_bytes, kind, filled, originals, make):
    assert read(f"{kind}://bucket/set/{pattern}", make(piece_bytes), workers) == read(f"{originals}/*.tar")


def test_a_forked_process_leaves_the_connections_of_its_parent_alone(kind, cloud):
    """Closed there, they are deaf here: both have one selector. What closes them is the end of the file system, which
    fsspec forgets in a forked process.
    """
    remote, url = Remote(2.0, kind.options(cloud.url)), f"{kind}://bucket/x"
    alive = weakref.ref(remote._system(url)[0])

    def child():
        fsspec.asyn.reset_lock()
        remote._system(url)
        gc.collect()
        assert alive() is not None

    process = get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_folders_are_globbed(kind, filled, make):
    """Over all pages of the listing; a file that lies where folders are looked for is none."""
    for folder in ("another", "other", "a/b", "a/c", "z/b"):
        filled.files |= {f"/{folder}/{name[5:]}": data for name, data in filled.files.items() if name[:5] == "/set/"}
    filled.files["/readme"] = b"text"
    store, bucket = make(), f"{kind}://bucket"
    for pattern, folders in {"*o*": ["another", "other"], "*/b": ["a/b", "z/b"], "a/[!b]": ["a/c"]}.items():
        found = [shard.url for shard in store.find(f"{bucket}/{pattern}/x-000.tar")]
        assert found == [f"{bucket}/{folder}/x-000.tar" for folder in folders]
    remote = Remote(20.0, kind.options(filled.url))
    assert remote.glob(f"{bucket}/*/") == [f"{bucket}/{name}" for name in ("a", "another", "other", "set", "z")]
    assert remote.glob(f"{bucket}/s*/x-*.tar") == [f"{bucket}/set/x-{k:03d}.tar" for k in range(len(COUNTS))]
    assert remote.glob(f"{bucket}/none/*") == []


@pytest.mark.parametrize("answer", [says(503), says(500), says(429), flaky.page], ids=["503", "500", "429", "html"])
def test_a_listing_that_fails_is_asked_for_again(answer, kind, filled, make):
    """A folder that is left out, as fsspec's glob does, would be missing from the data, and nobody would know."""
    filled.files = {f"/{folder}/b{name[4:]}": data for name, data in filled.files.items() for folder in "az"}
    for fine in range(3):
        filled.script["list"] = [None] * fine + [answer] * (1 if answer is flaky.page else 8)
        found = make(retries=12).find(f"{kind}://bucket/*/b/x-000.tar")
        assert [shard.url for shard in found] == [f"{kind}://bucket/{folder}/b/x-000.tar" for folder in "az"]
        assert not filled.script["list"]
    filled.script["list"] = [None, *[answer] * 99]
    with pytest.raises(UserError, match=r"cannot be had|is not there"):  # botocore reads an empty listing in a page
        make().find(f"{kind}://bucket/*/b/x-000.tar")


ILL = {
    "503": says(503),
    "429": says(429),
    "500": says(500),
    "proxy's 502": flaky.status(502),
    "reset": flaky.reset,
    "short read": flaky.short,
    "half": flaky.half,
    "empty": flaky.empty,
    "html": flaky.page,
    "longer": flaky.longer,
    "flipped": flaky.flipped,
    "404": says(404),
}


@MODES
@pytest.mark.parametrize("sick", ILL)
def test_an_illness_that_passes_changes_no_sample(sick, piece_bytes, kind, filled, originals, make):
    if sick == "flipped" and piece_bytes:
        pytest.skip("of a piece there is no checksum; a flipped bit costs the samples that it is in")
    for name in ("x-000.tar", "x-002.tar.idx", "x-004.tar.crc", INDEX):
        filled.script[f"/set/{name}"] = [ILL[sick]]
    assert read(f"{kind}://bucket/set/*.tar", make(piece_bytes)) == read(f"{originals}/*.tar")
    assert not filled.script["/set/x-000.tar"]


@MODES
@pytest.mark.parametrize("sick", ["503", "500", "reset", "short read", "html", "empty"])
def test_a_store_that_stays_ill_stops_the_run(sick, piece_bytes, kind, filled, make):
    store = make(piece_bytes)
    shard = store.find(f"{kind}://bucket/set/*.tar")[0]
    filled.always["/set/x-000.tar"] = ILL[sick]
    with pytest.raises(PassingError, match=rf"{kind}://bucket/set/x-000.tar cannot be had: .*tried 4 times"):
        store.read(shard, 0, some())
    del filled.always["/set/x-000.tar"]
    store.read(shard, 0, some())


@MODES
def test_a_connection_that_falls_silent_is_given_up(piece_bytes, kind, filled, make):
    """After timeout_seconds, which the client has under a name of its own."""
    store = make(piece_bytes, timeout_seconds=0.2, retries=0)
    shard = store.find(f"{kind}://bucket/set/*.tar")[0]
    filled.always["/set/x-000.tar"] = flaky.stall
    with pytest.raises(PassingError, match=r"x-000.tar cannot be had: .*tried 1 times"):
        store.read(shard, 0, some())


@MODES
@pytest.mark.parametrize("refused", ["denied", "expired"])
def test_credentials_that_are_refused_are_told(refused, piece_bytes, kind, filled, make):
    """At once: in the midst of a run, at its start, and by a listing."""
    store = make(piece_bytes)
    shard = store.find(f"{kind}://bucket/set/*.tar")[0]
    filled.requests.clear()
    filled.always["/set/x-000.tar"] = says(403) if refused == "denied" else kind.expired
    with pytest.raises(UserError, match="check the credentials"):
        store.read(shard, 0, some())
    assert filled.count("/set/x-000.tar") in ((1,) if refused == "denied" else kind.asked_when_expired)
    filled.always["*"] = filled.always.pop("/set/x-000.tar")
    for pattern in ("set/*.tar", "*/x-000.tar", "set/x-000.tar"):
        with pytest.raises(UserError, match="check the credentials") as caught:
            store.find(f"{kind}://bucket/{pattern}")
        assert not isinstance(caught.value, PassingError)
    with pytest.raises(UserError, match="check the credentials"):  # S3 answers HEAD with a number alone
        Remote(20.0, kind.options(filled.url)).size(shard.url)


@MODES
@pytest.mark.filterwarnings("ignore:the cache .* is too small")
def test_damage_is_that_of_the_files(piece_bytes, kind, tmp_path, filled, make):
    """A shard missing, one cut, one flipped."""
    folder = tmp_path / "set"
    write_set(folder, COUNTS)
    (folder / "x-004.tar").unlink()
    (folder / "x-002.tar").write_bytes((folder / "x-002.tar").read_bytes()[:20000])
    data = bytearray((folder / "x-005.tar").read_bytes())
    data[3000] ^= 1
    (folder / "x-005.tar").write_bytes(data)
    filled.files = {f"/set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    expected = read(f"{folder}/*.tar")
    found = read(f"{kind}://bucket/set/*.tar", make(piece_bytes))
    assert {f.kind for f in found.found} == {"missing_shard", "truncated", "checksum"}
    assert kinds(found.found) == kinds(expected.found)
    assert np.array_equal(found.samples, expected.samples)
    assert np.array_equal(found.labels, expected.labels)


@MODES
def test_a_shard_that_was_written_again_stops_the_run(piece_bytes, kind, filled, make):
    filled.files["/set/x-000.tar"] = shard_bytes(range(40))
    store = make(piece_bytes)
    shard = store.find(f"{kind}://bucket/set/x-000.tar")[0]
    with pytest.raises(UserError, match="it was written again"):
        store.read(shard, 0, some(shard.size))


@MODES
def test_names_are_any_that_a_store_may_have(piece_bytes, kind, filled, make):
    folder = "a b/+%41&=#é~"
    filled.files = {f"/{folder}/{name[5:]}": data for name, data in filled.files.items()}
    store = make(piece_bytes)
    for pattern in (f"{folder}/*.tar", "a*/+*/x-000.tar"):
        shard = store.find(f"{kind}://bucket/{pattern}")[0]
        data = some()
        store.read(shard, 0, data)
        assert data == filled.files[f"/{folder}/x-000.tar"][:100]


@MODES
def test_a_shard_is_one_request_and_its_pieces_one_each(piece_bytes, kind, filled, make):
    """Also one that is larger than what the client reads at once."""
    options = {**kind.options(filled.url), "default_block_size": 4096}
    store = make(piece_bytes, storage_options=options, steps_ahead=0)
    shard = store.find(f"{kind}://bucket/set/x-002.tar")[0]
    filled.requests.clear()
    data = some(shard.size)
    store.read(shard, 0, data)
    assert data == filled.files["/set/x-002.tar"]
    assert filled.requests == [("GET", "/set/x-002.tar")] * (-(-shard.size // piece_bytes) if piece_bytes else 1)


def test_the_index_is_written_beside_the_shards(kind, cloud, originals, sites, tmp_path):
    """The same bytes as of the files, and what is indexed is not fetched again; what lacks a file is."""
    cloud.files |= {f"/set/{path.name}": path.read_bytes() for path in originals.glob("*.tar")}
    report = index(sites(originals), 1)
    assert (len(report.shards), report.known, report.damaged) == (len(COUNTS), 0, {})
    assert cloud.files == {f"/set/{path.name}": path.read_bytes() for path in originals.iterdir()}
    cloud.requests.clear()
    assert index(sites(originals), 1).known == len(COUNTS)
    assert not any(name.endswith(".tar") and method == "GET" for method, name in cloud.requests)
    for name in ("x-001.tar.idx", "x-002.tar.crc"):
        del cloud.files[f"/set/{name}"]
    assert index(sites(originals), 1).known == len(COUNTS) - 2
    (tmp_path / INDEX).write_bytes(cloud.files[f"/set/{INDEX}"])
    assert read_index(tmp_path / INDEX) == read_index(originals / INDEX)


@pytest.mark.parametrize("answer", [says(503), says(500), says(429), cut], ids=["503", "500", "429", "cut"])
def test_an_ill_store_gets_the_same_index(answer, kind, cloud, originals, sites):
    cloud.files |= {f"/set/{path.name}": path.read_bytes() for path in originals.glob("*.tar")}
    for name in ("x-000.tar.idx", "x-004.tar.crc", INDEX):
        cloud.script[f"write /set/{name}"] = [answer] * 3
    cloud.script["/set/x-001.tar"] = [flaky.short]
    assert index(sites(originals), 1).damaged == {}
    assert cloud.files == {f"/set/{path.name}": path.read_bytes() for path in originals.iterdir()}


@pytest.mark.parametrize("refused", ["denied", "expired"])
def test_a_store_that_may_not_be_written_is_told_with_the_remedy(refused, kind, cloud, originals, sites):
    cloud.files |= {f"/set/{path.name}": path.read_bytes() for path in originals.glob("*.tar")}
    answer = says(403) if refused == "denied" else kind.expired
    for name in ("x-000.tar.idx", INDEX):
        cloud.script[f"write /set/{name}"] = [answer] * 99
    with pytest.raises(UserError, match=r"(?s)cannot be written .*check the credentials.*out=\.\.\."):
        index(sites(originals), 1)
    cloud.always["*"] = answer
    with pytest.raises(UserError, match="check the credentials") as caught:
        index(sites(originals), 1)
    assert not isinstance(caught.value, PassingError)


# What only S3 has.


@S3_ALONE
@pytest.mark.parametrize(
    ("options", "header"),
    [
        ({"anon": True}, None),
        ({"key": "me", "secret": "s"}, "Credential=me/"),
        ({"key": "me", "secret": "s", "token": "today"}, "Credential=me/"),
        ({"client_kwargs": {"aws_access_key_id": "me", "aws_secret_access_key": "s"}}, "Credential=me/"),
        ({}, "Credential=of-the-environment/"),
    ],
    ids=["anon", "key", "token", "client", "environment"],
)
def test_credentials_reach_the_store(options, header, filled, make, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    if options:
        given = options | {"client_kwargs": {"endpoint_url": filled.url} | options.get("client_kwargs", {})}
    else:
        given = {}
        monkeypatch.setenv("AWS_ENDPOINT_URL", filled.url)
    assert make(storage_options=given).find("s3a://bucket/set/x-000.tar")[0].url.startswith("s3a://")
    sent = filled.headers[-1]
    assert sent.get("X-Amz-Security-Token") == options.get("token")
    assert header in sent["Authorization"] if header else "Authorization" not in sent


SSO = "[profile p]\nsso_start_url=https://sso\nsso_region=x\nsso_account_id=1\nsso_role_name=r\nregion=x\n"


@S3_ALONE
@pytest.mark.parametrize("options", [{}, {"profile": "nobody"}, {"profile": "p"}], ids=["none", "profile", "sso"])
def test_credentials_that_are_not_there_are_told(options, filled, make, monkeypatch, tmp_path):
    (tmp_path / "config").write_text(SSO)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    store = make(storage_options={"endpoint_url": filled.url, **options})
    with pytest.raises(UserError, match="check the credentials") as caught:
        store.find("s3://bucket/set/*.tar")
    assert not isinstance(caught.value, PassingError)
    assert not filled.requests


@S3_ALONE
@pytest.mark.parametrize("word", ["InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed"])
def test_what_no_waiting_mends_is_no_range_beyond_the_end(word, filled, make):
    """s3fs has one exception for all of these; of a range beyond the end, a shard would be taken for a short one."""
    store = make(4096)
    shard = store.find("s3://bucket/set/*.tar")[0]
    filled.always["*"] = says(400, word)
    with pytest.raises(UserError, match="check the credentials") as caught:
        store.read(shard, 0, some())
    assert not isinstance(caught.value, PassingError)


@S3_ALONE
def test_how_long_the_store_wants_us_to_wait_is_heard(filled):
    remote = Remote(20.0, {"endpoint_url": filled.url, "anon": True})
    filled.always["*"] = says(503, Retry_After="7")
    with pytest.raises(Sick) as caught:
        remote.cat("s3://bucket/set/x-000.tar", 0, 10)
    assert caught.value.asked_seconds == 7.0


@S3_ALONE
def test_a_large_object_is_written_in_parts_and_read_with_its_checksum(cloud, kind):
    """A bit that flips on the way is found before it comes to us: of what was uploaded with a checksum."""
    remote = Remote(20.0, {**kind.options(cloud.url), "default_block_size": 5 << 20})
    data = np.random.default_rng(0).bytes((12 << 20) + 5)
    remote.put("s3://bucket/large", data)
    assert cloud.files["/large"] == data
    remote.put("s3://bucket/small", data[:1000])
    assert remote.whole("s3://bucket/small", 1000) == data[:1000]
    assert cloud.headers[-1]["x-amz-checksum-mode"] == "ENABLED"
    cloud.always["/small"] = flaky.flipped
    with pytest.raises(Sick, match="checksum"):
        remote.whole("s3://bucket/small", 1000)
    remote.put("s3://bucket/empty", b"")
    assert cloud.files["/empty"] == b""
