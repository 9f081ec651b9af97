"""Shards without index, read as they come: whole samples whatever happens on the way, or the end; bounded memory."""

import gzip
import tarfile
import tracemalloc
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import fsspec
import pytest
from streaming import flaky
from streaming.making import END, member
from streaming.stores import FIRST, ILL, NAMES, patience, wait_until
from streaming.three_shards import folder, server  # noqa: F401 (fixtures)

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.arrays import Label
from diffusion_trainer.streaming.damage import BadArchive, Damage, Truncated
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.pipeline import WebDatasetPipeline
from diffusion_trainer.streaming.remote import Remote
from diffusion_trainer.streaming.retries import AGAIN, Retries
from diffusion_trainer.streaming.streams import samples
from diffusion_trainer.streaming.writer import write_shard

pytestmark = pytest.mark.slow

MB = 1 << 20


def contents(url: str, timeout_seconds: float = 20.0, wanted=("bin", "cls"), at_most: int = MB) -> list:
    return list(samples(Remote(timeout_seconds, allow_pipe=True), Retries(3, 0.001), url, wanted, at_most))


@pytest.fixture(scope="module")
def truth(folder) -> list[tuple[str, dict[str, bytes]]]:
    """Of the first shard, as Python's tarfile reads it."""
    with tarfile.open(folder / NAMES[0]) as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar}
    return [(f"{i:04d}", {e: found[f"{i:04d}.{e}"] for e in ("bin", "cls")}) for i in range(10)]


def data(shards, **options) -> WebDatasetPipeline:
    few = {"retries": 3, "backoff_seconds": 0.001, "timeout_seconds": 20.0, "shuffle_buffer": 4, **options}
    return WebDatasetPipeline({"image": Label()}, shards, **few)


def batches(of: WebDatasetPipeline, steps: int = 6) -> list[dict]:
    return list(of.loader(Layout(8), 0, 8, 0, steps))


def labels(found: list[dict]) -> list[int]:
    return list(chain.from_iterable(batch["image"].tolist() for batch in found))


@pytest.mark.parametrize("scheme", ["http", "http without ranges", "file", "memory", "pipe", "path"])
def test_all_samples_are_those_of_the_files(scheme, folder, truth, server):
    fsspec.filesystem("memory").pipe({f"/d/{NAMES[0]}": (folder / NAMES[0]).read_bytes()})
    server.ranges = scheme == "http"
    base = {"file": f"file://{folder}", "memory": "memory://d", "pipe": f"pipe:cat {folder}", "path": str(folder)}
    assert contents(f"{base.get(scheme, server.url)}{FIRST}") == truth
    assert server.count(FIRST) == scheme.startswith("http")


@pytest.mark.parametrize("kind", ILL)
def test_an_illness_that_passes_changes_no_sample(kind, server, truth):
    server.script[FIRST] = [ILL[kind]]
    assert contents(f"{server.url}{FIRST}", patience(kind)) == truth
    assert server.count(FIRST) == 1 + (kind != "longer")  # of which the end mark is what was wanted


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("500", "500"), ("503", "503"), ("429", "429"), ("reset", "reset|disconnected|payload"), ("stall", "imeout"),
        ("short read", "payload"), ("html", "<!DOCTYPE html>"), ("empty", "0 bytes"), ("half", "where the object has"),
    ],
)  # fmt: skip
def test_a_store_that_stays_ill_stops_the_run_and_says_why(kind, said, server):
    server.always[FIRST] = ILL[kind]
    with pytest.raises(PassingError, match=rf"(?i){FIRST} cannot be had: .*({said}).*tried 4 times.*{AGAIN}$"):
        contents(f"{server.url}{FIRST}", patience(kind))
    assert server.count(FIRST) >= 4  # more, where one brings some more than that before


def test_what_comes_otherwise_the_second_time_is_not_put_behind_what_came_before(folder, tmp_path):
    """Samples of one size, as latents are, would join without a seam."""
    a, b, once = folder / NAMES[0], folder / NAMES[1], tmp_path / "once"
    with pytest.raises(PassingError, match="not begin with the 7000 bytes that came before"):
        contents(f"pipe:test -e {once} || {{ touch {once}; head -c 7000 {a}; exit 1; }}; cat {b}")


@pytest.mark.parametrize(("command", "said"), [("exit 3 #", "exit code 3"), ("sleep 1000 #", "silent")])
def test_commands_that_fail_or_fall_silent_are_tried_again(command, said):
    with pytest.raises(PassingError, match=f"{said}.*tried 4 times"):
        contents(f"pipe:{command} x.tar", patience(said))


def test_a_command_that_fails_in_the_middle_goes_on_where_it_broke_off(folder, truth, tmp_path):
    shard, once = folder / NAMES[0], tmp_path / "once"
    url = f"pipe:test -e {once} || {{ head -c 7000 {shard}; touch {once}; exit 1; }}; cat {shard}"
    assert contents(url) == truth


@pytest.mark.parametrize("code", [401, 403])
def test_credentials_that_are_refused_are_not_tried_again(code, server):
    server.always[FIRST] = flaky.status(code)
    with pytest.raises(UserError, match="check the credentials") as refused:
        contents(f"{server.url}{FIRST}")
    assert server.count(FIRST) == 1
    assert not isinstance(refused.value, PassingError)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_an_ill_store_are_those_of_the_files(workers, server, folder):
    truth = batches(data(f"{folder}/x-{{000000..000002}}.tar", num_workers=workers))
    illnesses = [
        answer for kind, answer in ILL.items() if kind not in ("stall", "404")
    ]  # workers share them: said twice
    server.script = {f"/{name}": illnesses * 4 for name in NAMES}
    of = data(f"{server.url}/x-{{000000..000002}}.tar", num_workers=workers, retries=99, backoff_seconds=0.0)
    assert sorted(of.first(8)["image"].tolist()) == sorted(of.first(8)["image"].tolist())  # before workers are forked
    found = batches(of)
    assert labels(found) == labels(truth)
    assert not any(batch["damage"] for batch in found)
    assert len(server.requests) > 20


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("illness", ["503", "all is gone"])
def test_a_store_that_goes_away_ends_the_run_as_one_that_may_be_started_again(workers, illness, server):
    of = data(f"{server.url}/x-{{000000..000002}}.tar", num_workers=workers)
    assert len(batches(of)) == 6
    for name in NAMES:
        server.always[f"/{name}"] = flaky.missing if illness == "all is gone" else flaky.status(503)
    found = batches(of)
    assert found[-1]["passing"]
    assert ("neither" if illness == "all is gone" else "cannot be had") in found[-1]["error"]
    assert not any(batch["damage"] for batch in found)


def test_one_shard_that_is_not_there_is_damage_and_of_many_none_is_a_mistake(server):
    server.always[FIRST] = flaky.missing
    found = batches(data(f"{server.url}/x-{{000000..000002}}.tar"), 20)
    assert set(labels(found)) == set(range(10, 30))
    assert {(f.kind, f.shard) for batch in found for f in batch["damage"]} == {("missing_shard", server.url + FIRST)}
    assert server.count(FIRST) == 2
    with pytest.raises(UserError, match=r"neither .*y-0\.tar is there nor .*y-1\.tar") as refused:
        data(f"{server.url}/y-{{0..1}}.tar").first(4)
    assert not isinstance(refused.value, PassingError)


SIZE, GOOD = 32 * MB, member("b.cls", b"7") + END
AFTER = [("b", {"cls": b"7"})]
BOMBS = {  # and what is read of them
    "a member": (lambda: member("a.cls", bytes(SIZE)) + GOOD, [("a", {"cls": "TooLarge"}), *AFTER]),
    "a member that nobody wants": (lambda: member("a.jpg", bytes(SIZE)) + GOOD, [("a", {}), *AFTER]),
    "a long name": (lambda: member("", bytes(SIZE), b"L") + GOOD, "TooLarge"),
    "pax records": (lambda: member("", bytes(SIZE), b"x") + GOOD, "TooLarge"),
    "zeros": (lambda: bytes(SIZE), []),
    "no tar": (lambda: b"a" * SIZE, "BadArchive"),
}


def kept(data: bytes | Damage) -> bytes | str:
    return data if isinstance(data, bytes) else type(data).__name__


@pytest.mark.parametrize("kind", BOMBS)
def test_what_is_large_when_inflated_takes_no_memory(kind, tmp_path):
    path, (bomb, expected) = tmp_path / "x.tar.gz", BOMBS[kind]
    path.write_bytes(gzip.compress(bomb(), 1))
    assert path.stat().st_size < MB
    tracemalloc.start()
    try:
        found = [(key, {e: kept(d) for e, d in m.items()}) for key, m in contents(str(path), wanted=["cls"])]
    except Damage as damage:
        found = kept(damage)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found == expected
    assert peak < 10 * MB


def test_a_sample_that_is_too_large_is_counted_and_others_are_used(tmp_path):
    write_shard(tmp_path / "x.tar", [{"__key__": f"{i}", "cls": b"%d" % i + b" " * 600 * (i % 2)} for i in range(10)])
    found = batches(data(str(tmp_path / "x.tar"), max_sample_bytes=512), 20)
    assert set(labels(found)) == {0, 2, 4, 6, 8}
    assert {f.kind for batch in found for f in batch["damage"]} == {"too_large"}


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_only_what_its_name_calls_compressed_is_inflated(name, folder, truth, tmp_path):
    path, tar = tmp_path / name, (folder / NAMES[0]).read_bytes()
    path.write_bytes(gzip.compress(tar))
    if name == "x.tar":
        with pytest.raises(BadArchive, match="compressed"):
            contents(str(path))
        return
    assert contents(str(path)) == truth
    assert contents(f"pipe:zcat {path}") == truth
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises((Truncated, BadArchive)):
        contents(str(path))


def test_a_path_that_is_no_file_is_a_mistake(folder):
    for path in (folder, folder / NAMES[0] / "x.tar"):
        with pytest.raises(UserError, match="is the URL right") as refused:
            contents(str(path))
        assert not isinstance(refused.value, PassingError)


@pytest.mark.parametrize("end", ["its reader goes", "it falls silent"])
def test_a_command_is_ended_with_all_that_it_has_started(end, folder, tmp_path):
    alive, shard = tmp_path / "alive", folder / NAMES[0]
    cut = "head -c 7000" if end == "it falls silent" else "cat"
    url = f"pipe:sleep 1000 & echo $! >> {alive}; {cut} {shard}; wait"
    if end == "its reader goes":
        assert len(contents(url)) == 10
    else:
        with pytest.raises(PassingError, match="silent"):
            contents(url, patience("silent"))
    started = alive.read_text().split()
    assert started
    wait_until(lambda: not any(runs(process) for process in started))


def runs(process: str) -> bool:
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


MESSAGES = {
    "text": b"Service temporarily down",
    "a page behind a mark of its bytes' order": b"\xef\xbb\xbf<html>login" + b" " * 2000,
    "nothing": None,
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_begins_as_no_tar_is_a_store_that_is_ill_and_no_damage(message, server, truth):
    def says(request: flaky.Handler, data: bytes, code: int) -> None:
        if MESSAGES[message] is None:
            request.send_response(204)
            request.end_headers()
        else:
            request.send(200, MESSAGES[message])

    server.script[FIRST] = [says]
    assert contents(f"{server.url}{FIRST}") == truth
    server.always[FIRST] = says
    with pytest.raises(PassingError, match=r"no tar: what came begins with|bytes came where the object has"):
        contents(f"{server.url}{FIRST}")


class Mute(Remote):
    """Tells no sizes, as servers that stream."""

    def size(self, url: str) -> None:
        return None


def test_a_short_answer_of_a_store_that_tells_no_size_is_believed_when_it_comes_again(server, truth):
    def found() -> Iterator[tuple[str, dict[str, bytes | Damage]]]:
        return samples(Mute(20.0), Retries(3, 0.001), f"{server.url}{FIRST}", ("bin", "cls"), MB)

    server.script[FIRST] = [flaky.half]
    assert list(found()) == truth
    server.always[FIRST] = flaky.half
    before = server.count(FIRST)
    with pytest.raises(Truncated):
        list(found())
    assert server.count(FIRST) == before + 2


def test_a_command_that_writes_nothing_is_no_empty_shard():
    with pytest.raises(PassingError, match=r"nothing came.*tried 4 times"):
        contents("pipe:true x.tar")


@pytest.mark.parametrize("key", ["{3F2504E0}-", "<HTML>-", "<!doctype ", "<?xml "])
@pytest.mark.parametrize("scheme", ["file://", "pipe:cat ", ""])
def test_a_member_may_have_any_name(key, scheme, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(member(f"{key}{i}.cls", b"%d" % i) for i in range(3)) + END)
    assert contents(f"{scheme}{path}") == [(f"{key}{i}", {"cls": b"%d" % i}) for i in range(3)]
