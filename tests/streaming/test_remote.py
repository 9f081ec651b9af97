"""Shards at URLs: whatever the store does, a sample is what it is in the file, or damage, or the run stops."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from queue import Queue
from threading import Event

import fsspec
import numpy as np
import pytest
from streaming import flaky
from streaming.flaky import serving
from streaming.making import shard_data, whole, write_set

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming import ahead, retries
from diffusion_trainer.streaming.ahead import Ahead
from diffusion_trainer.streaming.cached import CachedStore
from diffusion_trainer.streaming.damage import BadChecksum, Damage, Found, MissingShard, Truncated
from diffusion_trainer.streaming.files import THREADS
from diffusion_trainer.streaming.index import INDEX, Shard, write_index
from diffusion_trainer.streaming.remote import Remote
from diffusion_trainer.streaming.retries import AGAIN, Retries, Sick
from diffusion_trainer.streaming.samples import Samples
from diffusion_trainer.streaming.stores import LocalStore, Store
from diffusion_trainer.streaming.writer import write_shards

PIECE = 8192
MODES = pytest.mark.parametrize("piece_bytes", [None, PIECE], ids=["whole", "pieces"])
NAMES = [f"x-{k:06d}.tar" for k in range(3)]
FIRST = f"/{NAMES[0]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three shards of ten samples."""
    out = tmp_path_factory.mktemp("shards")
    draws = np.random.default_rng(0)
    samples = [{"__key__": f"{i:04d}", "bin": draws.bytes(700 + 50 * i), "cls": b"%d" % i} for i in range(30)]
    write_shards(iter(samples), out, "x", 10)
    return out


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
    def store(piece_bytes: int | None = None, **options) -> CachedStore:
        chosen = {"retries": 3, "backoff_seconds": 0.001, "timeout_seconds": 20.0, "cache_bytes": 1 << 20, **options}
        return CachedStore(str(tmp_path / "cache"), piece_bytes=piece_bytes, **chosen)

    return store


def gets(folder: Path, name: str, piece_bytes: int | None) -> int:
    """Requests that fetch all samples of a shard."""
    end = int(np.fromfile(folder / f"{name}.idx", "<u8")[-1])
    return -(-end // piece_bytes) if piece_bytes else 1


def contents(store: Store, pattern: str) -> list[bytes]:
    """All samples, in order; damage by its kind."""
    shards = store.find(pattern)
    samples, found = Samples(shards, store, 1 << 20), []
    for k, shard in enumerate(shards):
        for i in range(shard.samples):
            try:
                found.append(bytes(samples.bytes_of(k, i)))
            except Damage as damage:
                found.append(damage.kind.encode())
    return found


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


ILL = {
    "500": flaky.status(500),
    "503": flaky.status(503, Retry_After="0"),
    "429": flaky.status(429, Retry_After="0"),
    "reset": flaky.reset,
    "stall": flaky.stall,
    "short read": flaky.short,
    "html": flaky.page,
    "empty": flaky.empty,
    "half": flaky.half,
    "longer": flaky.longer,
    "404": flaky.missing,
}


def patience(kind: str) -> float:
    """Seconds until a stall is one; too few for a machine under load make more of them."""
    return 0.2 if kind in ("stall", "silent") else 20.0


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


@MODES
def test_a_truncated_shard_gives_the_samples_before_the_cut(piece_bytes, server, truth, make):
    server.files[FIRST] = server.files[FIRST][:9000]
    offsets = np.frombuffer(server.files[f"{FIRST}.idx"], "<u8")
    whole = sum(last <= 9000 for last in offsets[1:])
    assert 0 < whole < 9
    found = contents(make(piece_bytes), f"{server.url}/*.tar")
    assert found == [*truth[:whole], *[b"truncated"] * (10 - whole), *truth[10:]]
    assert contents(make(piece_bytes), f"{server.url}/*.tar") == found  # from the cache


@MODES
def test_a_shard_cut_between_pieces_and_one_with_nothing_behind_its_first_piece(piece_bytes, server, truth, make):
    server.files[FIRST] = server.files[FIRST][:PIECE]
    found = contents(make(piece_bytes), f"{server.url}/{NAMES[0]}")
    assert found[0] == truth[0]
    assert found[-1] == b"truncated"


@MODES
def test_flipped_bits_in_the_store_cost_the_samples_that_they_are_in(piece_bytes, server, truth, make):
    offsets = np.frombuffer(server.files[f"{FIRST}.idx"], "<u8").tolist()
    data = bytearray(server.files[FIRST])
    for sample in (0, 4):  # in the first, in the header: the shard begins with no valid one
        data[offsets[sample] + 3] ^= 255
    server.files[FIRST] = bytes(data)
    expected = [b"checksum" if i in (0, 4) else sample for i, sample in enumerate(truth)]
    assert contents(make(piece_bytes), f"{server.url}/*.tar") == expected
    assert piece_bytes or server.count(FIRST) == 2  # what comes twice is what the store has


def test_half_an_answer_that_comes_twice_is_not_the_truth_while_the_object_is_whole(server, truth, make):
    for piece_bytes in (None, PIECE):
        server.script[FIRST] = [flaky.half] * 3
        assert contents(make(piece_bytes), f"{server.url}/*.tar") == truth


@MODES
def test_a_missing_shard_is_damage_and_asked_for_once(piece_bytes, server, truth, make):
    del server.files[FIRST]
    store = make(piece_bytes)
    assert contents(store, f"{server.url}/*.tar") == [*[b"missing_shard"] * 10, *truth[10:]]
    assert server.count(FIRST) == 2
    with pytest.raises(MissingShard):
        store.read(store.find(f"{server.url}/*.tar")[0], 0, memoryview(bytearray(10)))
    assert server.count(FIRST) == 2


def test_shards_that_are_missing_with_their_index_are_a_store_that_is_down(server, make):
    store = make()
    shard = store.find(f"{server.url}/*.tar")[0]
    server.files.clear()
    with pytest.raises(UserError, match=rf"neither .*{NAMES[0]} is there any more nor .*index.json"):
        store.read(shard, 0, memoryview(bytearray(10)))


def test_a_missing_shard_of_an_index_elsewhere_is_damage_while_others_are_there(server, folder, truth, make):
    for name in [name for name in server.files if not name.endswith(".tar")]:
        del server.files[name]
    del server.files[FIRST]
    store = make(index=str(folder))
    assert contents(store, f"{server.url}/*.tar") == [*[b"missing_shard"] * 10, *truth[10:]]
    server.files.clear()
    with pytest.raises(UserError, match=r"neither .*x-000000.tar is there any more nor .*x-000001.tar nor .*x-0"):
        contents(make(index=str(folder), cache_bytes=1 << 19), f"{server.url}/*.tar")


@MODES
def test_a_shard_that_grew_is_not_what_its_index_describes(piece_bytes, server, make):
    server.files[FIRST] += bytes(512)
    with pytest.raises(UserError, match="it was written again"):
        contents(make(piece_bytes), f"{server.url}/*.tar")


@pytest.mark.parametrize("change", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-4]])
def test_an_index_file_that_does_not_fit_is_an_error_until_it_is_mended(change, server, truth, make):
    name, store = f"{FIRST}.crc", make()
    right = server.files[name]
    server.files[name] = change(right)
    with pytest.raises(UserError, match="not what its index describes"):
        contents(store, f"{server.url}/*.tar")
    assert server.count(name) == 2
    server.files[name] = right
    server.script[name] = [lambda request, data, code: request.send(code, change(data))]
    assert contents(store, f"{server.url}/*.tar") == truth


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


def test_reading_beyond_the_end_of_a_shard_is_truncation(server, make):
    for piece_bytes in (None, PIECE):
        store = make(piece_bytes)
        shard = store.find(f"{server.url}/*.tar")[0]
        for offset in (shard.size - 4, shard.size, shard.size + 10 * PIECE):
            with pytest.raises(Truncated):
                store.read(shard, offset, memoryview(bytearray(8)))


@pytest.mark.parametrize("name", [f"{FIRST}.idx", FIRST])
def test_a_page_is_no_index_file_and_no_piece(name, server, make):
    server.script[FIRST] = [flaky.ok]
    server.always[name] = flaky.page
    with pytest.raises(PassingError, match=rf"{name} cannot be had: .*<!DOCTYPE"):
        contents(make(PIECE), f"{server.url}/*.tar")


def test_missing_index_files_are_named_with_their_remedy(server, make):
    store = make()
    shard = store.find(f"{server.url}/*.tar")[0]
    del server.files[f"{FIRST}.idx"]
    with pytest.raises(UserError, match=r"x-000000.tar.idx is missing.*diffusion-trainer index .*x-000000.tar"):
        store.sidecar(shard, ".idx")
    with pytest.raises(UserError, match="image_sizes=true"):
        store.sidecar(shard, ".size")


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


def test_patterns_name_what_the_index_has(server, folder, make):
    store = make()
    urls = [f"{server.url}/{name}" for name in NAMES]
    assert [s.url for s in store.find(f"{server.url}/*.tar")] == urls
    assert [s.url for s in store.find(f"{server.url}/x-00000{{2,0}}.tar")] == [urls[2], urls[0]]
    assert [s.url for s in store.find(str(folder / "*.tar"))] == [str(folder / name) for name in NAMES]
    for pattern in ("y-*.tar", "x-{000000..000003}.tar"):
        with pytest.raises(UserError, match="no index names"):
            store.find(f"{server.url}/{pattern}")
    with pytest.raises(UserError, match=r"index.json is not there"):
        store.find(f"{server.url}/sub/*.tar")


def test_folders_are_globbed_where_the_store_lists(server, folder, make):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe({f"/s/{d}/{p.name}": p.read_bytes() for p in folder.iterdir() for d in "ab"})
    store = make()
    found = [shard.url for shard in store.find("memory://s/*/x-000001.tar")]
    assert [url.rpartition("//")[2].lstrip("/") for url in found] == ["s/a/x-000001.tar", "s/b/x-000001.tar"]
    assert len(contents(store, "memory://s/*/x-000001.tar")) == 20
    with pytest.raises(UserError, match="braces"):
        store.find(f"{server.url}/*/x.tar")


@pytest.mark.parametrize("url", ["http://me:secret@h/x.tar", "http://h/x.tar?sig=secret", "https://h/x.tar#secret"])
def test_secrets_stay_out_of_urls_and_messages(url, make):
    with pytest.raises(UserError, match="storage_options") as caught:
        make().find(url)
    assert "secret" not in str(caught.value)


def test_an_index_names_files_of_its_folder_alone(server, folder, tmp_path, make):
    write_index(tmp_path, [Shard("../../x.tar", 1, 2, 3)])
    server.files[f"/{INDEX}"] = (tmp_path / INDEX).read_bytes()
    with pytest.raises(UserError, match="not beside it"):
        make().find(f"{server.url}/*.tar")
    with pytest.raises(UserError, match="not beside it"):
        make(index=str(tmp_path)).find(f"{server.url}/*.tar")


def test_a_shard_that_is_said_to_have_no_bytes_is_truncated(server, make):
    for piece_bytes in (None, 4096):
        with pytest.raises(Truncated):
            make(piece_bytes).read(Shard(f"{server.url}/x-000000.tar", 0, 0, 0), 0, memoryview(bytearray(1)))


def test_a_shard_that_can_never_fit_is_refused_at_once(server, make):
    with pytest.raises(UserError, match="cache_bytes=2000"):
        make(cache_bytes=2000).find(f"{server.url}/*.tar")
    assert make(1000, cache_bytes=2000).find(f"{server.url}/*.tar")


@pytest.mark.parametrize(
    "wrong",
    [
        {"piece_bytes": 0}, {"cache_bytes": 0}, {"piece_bytes": 9, "cache_bytes": 8}, {"retries": -1},
        {"timeout_seconds": 0}, {"backoff_seconds": -1.0}, {"steps_ahead": -1},
    ],
)  # fmt: skip
def test_wrong_numbers_are_refused(wrong, make):
    with pytest.raises(ValueError, match="must"):
        make(**wrong)


def test_options_reach_the_backend(server, make):
    make(storage_options={"headers": {"X-Token": "a"}}).find(f"{server.url}/*.tar")
    assert server.headers[-1]["X-Token"] == "a"
    assert server.headers[-1]["Accept-Encoding"] == "identity"
    merged = Remote(3.0, {"client_kwargs": {"trust_env": False}, "encoded": True})._system(server.url)[0]
    assert merged.client_kwargs["timeout"].sock_read == 3.0
    assert merged.client_kwargs["timeout"].total is None
    assert not merged.client_kwargs["trust_env"]
    assert merged.encoded


@pytest.mark.parametrize(
    ("url", "line"), [("s3://b/x.tar", r"\[s3\]'"), ("gs://b/x.tar", r"\[gcs\]'"), ("qq://b/x.tar", "not known: qq")]
)
def test_a_backend_that_is_not_installed_is_named_with_its_command(url, line, make, monkeypatch):
    for module in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=line):
        make().find(url)


def test_commands_run_only_where_they_are_allowed(folder, tmp_path, make):
    with pytest.raises(UserError, match="allow_pipe=true"):
        make().find(f"pipe:touch {tmp_path}/ran; cat {folder}/x-000000.tar")
    with pytest.raises(UserError, match="allow_pipe=true"):
        make(index=str(folder)).find(f"pipe:touch {tmp_path}/ran; cat {folder}/x-000000.tar")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="piece_bytes=null"):
        make(PIECE, allow_pipe=True).find(f"pipe:cat {folder}/x-000000.tar")
    with pytest.raises(UserError, match=r"no \*"):
        make(allow_pipe=True).find(f"pipe:cat {folder}/*.tar")
    with pytest.raises(UserError, match=r"ends with \.tar"):
        make(allow_pipe=True).find("pipe:true")


def test_commands_give_the_same_samples(folder, truth, make):
    assert contents(make(allow_pipe=True), f"pipe:cat '{folder}/x-{{000000..000002}}.tar' | cat") == truth


@pytest.mark.parametrize(("command", "said"), [("exit 3 #", "exit code 3"), ("exec sleep 1000 #", "silent")])
def test_commands_that_fail_or_fall_silent_are_tried_again(command, said, make):
    with pytest.raises(UserError, match=f"{said}.*tried 4 times"):
        make(allow_pipe=True, timeout_seconds=patience(said)).find(f"pipe:{command} x.tar")


def spans(store: CachedStore, pattern: str) -> list[tuple[Shard, int, int]]:
    return [
        (shard, int(a), int(b))
        for shard in store.find(pattern)
        for a, b in pairwise(np.frombuffer(store.sidecar(shard, ".idx"), "<u8"))
    ]


@MODES
def test_what_was_fetched_ahead_is_not_fetched_again(piece_bytes, server, folder, truth, make):
    store = make(piece_bytes)
    wanted = spans(store, f"{server.url}/*.tar")
    for _ in range(3):
        store.ahead(wanted)
    needed = {name: gets(folder, name, piece_bytes) for name in NAMES}
    entries = Path(store.cache) / "entries"
    wait_until(lambda: len(list(entries.iterdir())) == len(NAMES) + sum(needed.values()))
    assert {name: server.count(f"/{name}") for name in NAMES} == needed
    assert contents(store, f"{server.url}/*.tar") == truth
    assert {name: server.count(f"/{name}") for name in NAMES} == needed


def test_what_goes_wrong_ahead_is_told_to_the_reader_alone(server, folder, truth, make):
    """And ends no thread: there are fewer of them than pieces here."""
    store = make(PIECE, cache_bytes=1 << 22)
    wanted = spans(store, f"{server.url}/*.tar")
    server.always[FIRST] = flaky.status(403)
    bad, good = gets(folder, NAMES[0], PIECE), gets(folder, NAMES[2], PIECE)
    assert bad >= THREADS
    store.ahead(wanted[:10])
    store.ahead(wanted[20:])
    wait_until(lambda: (server.count(FIRST), server.count(f"/{NAMES[2]}")) == (bad, good))
    with pytest.raises(UserError, match="credentials"):
        store.read(*wanted[0][:2], memoryview(bytearray(10)))
    del server.always[FIRST]
    assert contents(store, f"{server.url}/*.tar") == truth


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_forked_process_reads_and_fetches_ahead(server, truth, make):
    store = make()
    wanted = spans(store, f"{server.url}/*.tar")
    store.ahead(wanted[:1])
    store.read(wanted[0][0], 0, memoryview(bytearray(10)))
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            store.ahead(wanted)
            wait_until(lambda: len(list((Path(store.cache) / "entries").iterdir())) == 2 * len(NAMES))
            os._exit(0 if contents(store, f"{server.url}/*.tar") == truth else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(store, f"{server.url}/*.tar") == truth
    assert all(server.count(f"/{name}") == 1 for name in NAMES)


def test_what_is_asked_for_again_and_again_is_fetched_once_a_minute(monkeypatch):
    fetched, now = Queue(), 1000.0
    monkeypatch.setattr(ahead.time, "monotonic", lambda: now)
    fetch = Ahead(fetched.put, 1)
    for _ in range(3):
        fetch("abc")
    now += 61
    fetch("cd")
    assert [fetched.get(timeout=20) for _ in range(5)] == ["a", "b", "c", "c", "d"]
    assert fetched.empty()


def test_what_finds_no_place_in_the_queue_may_be_asked_for_again():
    go_on, fetched = Event(), Queue()
    fetch = Ahead(lambda thing: (go_on.wait(20), fetched.put(thing)), 1)
    fetch(range(5000))  # at once, though nothing is fetched
    go_on.set()
    first = [fetched.get(timeout=20) for _ in range(ahead.MAX_QUEUED)]
    assert first == list(range(ahead.MAX_QUEUED))
    fetch([4999])
    while fetched.get(timeout=20) != 4999:
        pass


ENDING = """
import sys
from diffusion_trainer.streaming.cached import CachedStore
store = CachedStore(sys.argv[1], 1 << 20, timeout_seconds=1000)
store.ahead([(shard, 0, 10) for shard in store.find(sys.argv[2] + "/*.tar")])
sys.stdin.readline()
"""


@pytest.mark.slow
def test_an_interpreter_that_ends_does_not_wait_for_what_it_fetches(server, tmp_path):
    server.always = {f"/{name}": flaky.stall for name in NAMES}
    arguments = [sys.executable, "-c", ENDING, str(tmp_path / "cache"), server.url]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(2):  # the index, and one of those that stall
        assert server.arrived.acquire(timeout=60)
    _, errors = process.communicate("\n", timeout=30)
    assert process.returncode == 0, errors
    assert not errors


def test_damage_is_the_same_from_a_file_and_from_a_store(folder, tmp_path, server, make):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray((folder / NAMES[0]).read_bytes())
    data[5000] ^= 1
    (copy / NAMES[0]).write_bytes(data)
    (copy / NAMES[1]).write_bytes((folder / NAMES[1]).read_bytes()[:12345])
    (copy / NAMES[2]).unlink()
    server.files = {f"/{p.name}": p.read_bytes() for p in copy.iterdir()}
    local = contents(LocalStore(), str(copy / "*.tar"))
    assert {BadChecksum.kind, Truncated.kind, MissingShard.kind} <= {found.decode(errors="replace") for found in local}
    for piece_bytes in (None, PIECE):
        assert contents(make(piece_bytes), f"{server.url}/*.tar") == local


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
