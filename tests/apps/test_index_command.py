"""diffusion-trainer index, as a user runs it."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import command, finish
from streaming.flaky import serving
from streaming.making import END, member, shard_bytes

from diffusion_trainer.apps import cli
from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.index import read_index
from diffusion_trainer.streaming.retries import AGAIN
from diffusion_trainer.streaming.scanning import scan

INDEX = "shards/index.json"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A workplace with four shards that have no index, and what else lies in such folders."""
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    for k in range(4):
        Path(f"shards/x-{k:03d}.tar").write_bytes(shard_bytes(range(10 * k, 10 * k + k)))
    Path("shards/notes.txt").write_text("not a shard")
    return tmp_path


def contents(folder: str = "shards") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    code = cli.run(["index", *arguments])
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_files(here, capsys):
    code, said, _ = run("shards/*.tar", "processes=1", capsys=capsys)
    assert code == 0
    assert "4 shards" in said
    assert "6 samples with .cls, .npy" in said
    one = contents()
    assert len(one) == 4 * 3 + 2
    assert [s.samples for s in read_index(here / INDEX)] == [0, 1, 2, 3]
    for name in set(one) - {f"x-{k:03d}.tar" for k in range(4)} - {"notes.txt"}:
        Path("shards", name).unlink()
    assert run("shards", "processes=2", capsys=capsys)[0] == 0
    assert contents() == one


def test_names_from_shards_do_not_command_the_terminal(here, capsys):
    evil = "jpg\n\x1b[2Jindex: 9 shards, all well\x9b31m"
    Path("shards/x-000.tar").write_bytes(member(f"a.{evil}", b"1") + END)
    Path("shards/x-001.tar").write_bytes(2 * member(f"a.{evil}", b"1") + END)
    code, said, told = run("shards/x-00[01].tar", "processes=1", capsys=capsys)
    assert code == 2
    assert [len(text.splitlines()) for text in (said, told)] == [2, 2]
    assert (said + told).replace("\n", "").isprintable()
    assert r".jpg\n\x1b[2jindex" in said
    assert r"a.jpg\n\x1b[2Jindex: 9 shards, all well\x9b31m is in it twice" in told


def test_a_damaged_shard_is_named_left_out_and_kept_on_demand(here, capsys):
    os.truncate("shards/x-003.tar", 5000)
    code, said, told = run("shards/x-{000..003}.tar", "processes=1", capsys=capsys)
    assert code == 2
    assert "3 shards" in said
    assert "damaged: shards/x-003.tar: " in told
    assert "keep_damaged=true" in told
    assert [s.url for s in read_index(here / INDEX)] == [f"x-{k:03d}.tar" for k in range(3)]
    code, said, told = run("shards/*.tar", "keep_damaged=true", "processes=1", capsys=capsys)
    assert code == 0
    assert "4 shards, 3 of them indexed before" in said
    assert "damaged: shards/x-003.tar: " in told
    assert read_index(here / INDEX)[3] == scan(Path("shards/x-003.tar")).shard("x-003.tar")


def test_the_same_command_again_has_nothing_to_do(here, capsys):
    """Also where its pattern names what the first run wrote."""
    assert run("shards/x-*", "processes=1", capsys=capsys)[0] == 0
    before = contents()
    code, said, told = run("shards/x-*", "processes=1", capsys=capsys)
    assert (code, told) == (0, "")
    assert "4 shards, 4 of them indexed before" in said
    assert contents() == before


@pytest.mark.slow
def test_it_goes_on_after_it_was_killed(here):
    """All its processes at once; what is written is whole, and the same command does the rest."""
    for k in range(4, 60):
        Path(f"shards/x-{k:03d}.tar").write_bytes(shard_bytes(range(40)))
    process = command("index", "shards/*.tar", "processes=2", cwd=here)
    end = time.monotonic() + 60
    while not list(here.glob("shards/*.idx")) and time.monotonic() < end:
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    finish(process)
    code, output = finish(command("index", "shards/*.tar", "processes=1", cwd=here))
    assert code == 0, output
    assert read_index(here / INDEX) == [scan(p).shard(p.name) for p in sorted(here.glob("shards/*.tar"))]


@pytest.mark.slow
def test_a_process_that_is_killed_is_told_and_what_was_done_stands(here):
    for k in range(4, 300):
        Path(f"shards/x-{k:03d}.tar").write_bytes(shard_bytes(range(60)))
    process = command("index", "shards/*.tar", "processes=2", cwd=here)
    end = time.monotonic() + 60
    while len(list(here.glob("shards/*.idx"))) < 5 and time.monotonic() < end:
        time.sleep(0.005)
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(int(pid), signal.SIGKILL)
    code, output = finish(process)
    assert (code, "Traceback" in output) == (2, False), output
    assert 1 <= len(read_index(here / INDEX)) <= 300


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_keeps_what_was_done(here, processes):
    for k in range(4, 300):
        Path(f"shards/x-{k:03d}.tar").write_bytes(shard_bytes(range(60)))
    process = command("index", "shards/*.tar", f"processes={processes}", cwd=here)
    end = time.monotonic() + 60
    while len(list(here.glob("shards/*.idx"))) < 5 and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert (code, "Traceback" in output) == (130, False), output
    assert 1 <= len(read_index(here / INDEX)) <= 300


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_shards_at_urls_have_the_index_of_their_copies_here(here, capsys, monkeypatch, processes):
    """In a folder for a store that takes no files, beside them in another; a URL that is given twice counts once."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shutil.copytree("shards", "there")
    with serving(here / "there") as server:
        url = f"{server.url}/x-{{000..003}}.tar"
        code, said, _ = run(url, url, "out=made", f"processes={processes}", capsys=capsys)
    assert code == 0
    assert "4 shards, 6 samples" in said
    assert run(f"file://{here}/there/x-*.tar", f"processes={processes}", capsys=capsys)[0] == 0
    assert run("shards", "processes=1", capsys=capsys)[0] == 0
    assert contents("there") == contents("shards")
    assert contents("made") == {n: d for n, d in contents("shards").items() if not n.endswith((".tar", ".txt"))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which shards"),
        (["none/*.tar"], "no file matches none"),
        (["shards/x-{000..009}.tar"], r"no file matches shards/x-004\.tar"),
        (["shards/*.tar", "proceses=2"], "no file matches proceses=2"),
        (["shards/*.tar", "processes=0"], "processes must be positive"),
        (["shards/*.tar", "again=perhaps"], "again"),
        (["http://127.0.0.1:1/x.tar", "retries=0"], rf"cannot be had.*\. {AGAIN}$"),
    ],
)
def test_mistakes_are_told(here, arguments, message):
    with pytest.raises(UserError, match=message):
        cli.run(["index", *arguments])
    assert not (here / INDEX).exists()


def test_an_index_that_is_none_is_refused_and_not_replaced(here):
    (here / INDEX).write_text("{}")
    with pytest.raises(UserError, match=r"index\.json is no index"):
        cli.run(["index", "shards/*.tar", "processes=1"])
    assert (here / INDEX).read_text() == "{}"


def test_a_tar_with_no_samples_and_a_folder_that_cannot_be_written(here, capsys):
    Path("shards/y.tar").write_bytes(member("README", b"1") + END)
    code, said, _ = run("shards/y.tar", "processes=1", capsys=capsys)
    assert code == 0
    assert "1 shards, 0 samples" in said
    Path("shards/x-001.tar.idx").mkdir()  # as good as a folder without permission, which root would have
    with pytest.raises(UserError, match="cannot index"):
        run("shards/x-001.tar", "processes=1", capsys=capsys)
