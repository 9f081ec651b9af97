"""Shards at URLs: whatever the store does, a sample is what it is in the file, or the run stops."""

import fsspec
import pytest
from streaming import flaky
from streaming.flaky import serving
from streaming.making import shard_data, whole, write_set
from streaming.stores import FIRST, ILL, MODES, NAMES, PIECE, contents, gets, patience
from streaming.three_shards import folder, make, server, truth  # noqa: F401 (fixtures)

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.damage import Found
from diffusion_trainer.streaming.index import INDEX
from diffusion_trainer.streaming.retries import AGAIN

pytestmark = pytest.mark.slow


@MODES
@pytest.mark.parametrize("scheme", ["http", "file", "memory"])
def test_all_samples_are_those_of_the_files(scheme, piece_bytes, folder, truth, server, make):
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pipe({f"/d/{p.name}": p.read_bytes() for p in folder.iterdir()})
    base = {"http": server.url, "file": f"file://{folder}", "memory": "memory://d"}[scheme]
    for pattern in (f"{base}/*.tar", f"{base}/x-{{000000..000002}}.tar"):
        assert contents(make(piece_bytes), pattern) == truth
    if scheme == "http":
        assert [server.count(f"/{name}") for name in NAMES] == [gets(folder, name, piece_bytes) for name in NAMES]


@MODES
@pytest.mark.parametrize("kind", ILL)
def test_an_illness_that_passes_changes_no_sample(kind, piece_bytes, server, folder, truth, make):
    names = [NAMES[0], f"{NAMES[1]}.idx", f"{NAMES[2]}.crc", INDEX]
    for name in names:
        server.script[f"/{name}"] = [ILL[kind]]
    assert contents(make(piece_bytes, timeout_seconds=patience(kind)), f"{server.url}/*.tar") == truth
    assert not any(server.script.values())
    assert server.count(FIRST) == 1 + gets(folder, NAMES[0], piece_bytes) or kind == "stall"


def test_a_flipped_bit_on_the_way_changes_no_sample(server, truth, make):
    server.script[FIRST] = [flaky.flipped]
    assert contents(make(), f"{server.url}/*.tar") == truth
    assert server.count(FIRST) == 2


@MODES
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("500", "500"), ("503", "503"), ("429", "429"), ("reset", "reset|disconnected|payload"), ("stall", "imeout"),
        ("short read", "payload"), ("html", "<!DOCTYPE html>"), ("empty", "0 bytes"),
    ],
)  # fmt: skip
def test_a_store_that_stays_ill_stops_the_run_and_says_why(kind, said, piece_bytes, server, make):
    store = make(piece_bytes, timeout_seconds=patience(kind))
    shard = store.find(f"{server.url}/*.tar")[0]
    server.always[FIRST] = ILL[kind]
    with pytest.raises(PassingError, match=rf"(?i){FIRST} cannot be had: .*({said}).*tried 4 times.*{AGAIN}$"):
        store.read(shard, 0, memoryview(bytearray(100)))
    assert server.count(FIRST) == 4
    del server.always[FIRST]
    store.read(shard, 0, memoryview(bytearray(100)))


@pytest.mark.parametrize("code", [401, 403])
def test_credentials_that_are_refused_are_not_tried_again(code, server, make):
    store = make()
    shard = store.find(f"{server.url}/*.tar")[0]
    server.always[FIRST] = flaky.status(code)
    with pytest.raises(UserError, match="check the credentials"):
        store.read(shard, 0, memoryview(bytearray(100)))
    assert server.count(FIRST) == 1


def test_half_an_answer_that_comes_twice_is_not_the_truth_while_the_object_is_whole(server, truth, make):
    for piece_bytes in (None, PIECE):
        server.script[FIRST] = [flaky.half] * 3
        assert contents(make(piece_bytes), f"{server.url}/*.tar") == truth


def test_an_answer_without_end_is_cut(server, make):
    """Else it would fill the disk."""
    server.always[FIRST] = flaky.endless
    with pytest.raises(UserError, match="it was written again"):
        contents(make(), f"{server.url}/*.tar")
    assert 0 < server.sent < 100


def test_a_server_without_ranges_is_found_out(server, make):
    server.ranges = False
    with pytest.raises(UserError, match="piece_bytes=null"):
        contents(make(PIECE), f"{server.url}/*.tar")


@pytest.mark.parametrize("name", [f"{FIRST}.idx", FIRST])
def test_a_page_is_no_index_file_and_no_piece(name, server, make):
    server.script[FIRST] = [flaky.ok]
    server.always[name] = flaky.page
    with pytest.raises(PassingError, match=rf"{name} cannot be had: .*<!DOCTYPE"):
        contents(make(PIECE), f"{server.url}/*.tar")


@MODES
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 2)])
@pytest.mark.filterwarnings("ignore:the cache .* is too small")
def test_global_batches_from_an_ill_store_are_those_of_the_files(world, workers, piece_bytes, tmp_path, make):
    """Shards missing, cut and flipped as well, and every third request fails; a cache that is too small for all."""
    paths = write_set(tmp_path / "set", [9, 1, 30, 0, 12, 17])
    paths[4].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:20000])
    data = bytearray(paths[5].read_bytes())
    data[3000] ^= 1
    paths[5].write_bytes(data)
    truth = whole(shard_data(f"{tmp_path}/set/*.tar", window=6, damage_budget=0.9), 8, range(3, 15))
    assert {found.kind for found in truth.found} == {"missing_shard", "truncated", "checksum"}
    with serving(tmp_path / "set") as server:
        server.script = {f"/{p.name}": [flaky.status(503), flaky.ok, flaky.short] * 4 for p in paths}
        server.script |= {name: [] for name in server.files if name not in server.script}
        store = make(piece_bytes, cache_bytes=70_000, retries=9)
        remote = shard_data(f"{server.url}/*.tar", window=6, damage_budget=0.9, num_workers=workers, store=store)
        found = whole(remote, 8, range(3, 15), world)
    assert [kinds(f) for f in found.found] == [kinds(f) for f in truth.found]
    found.found = truth.found
    assert found == truth


def kinds(found: Found) -> tuple[str, str, int]:
    """Without what the storage says of it."""
    return found.kind, found.shard.rpartition("/")[2], found.sample
