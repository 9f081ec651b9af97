"""What a URL may be: patterns, backends, commands, and options that are refused."""

import sys

import fsspec
import pytest
from fsspec.registry import _registry
from streaming.stores import NAMES, PIECE, contents, patience
from streaming.three_shards import folder, make, server, truth  # noqa: F401 (fixtures)

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.index import INDEX, Shard, write_index
from diffusion_trainer.streaming.remote import Remote


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


def test_an_index_brings_no_command_though_ones_own_are_allowed(tmp_path, make, monkeypatch):
    """In the working folder, whose names have nothing before them."""
    monkeypatch.chdir(tmp_path)
    write_index(tmp_path, [Shard("pipe:touch done; cat x #.tar", 1, 2048, 3)])
    with pytest.raises(UserError, match="not beside it"):
        make(allow_pipe=True).find("*.tar")
    assert not (tmp_path / "done").exists()


def test_an_index_names_files_of_its_folder_alone(server, folder, tmp_path, make):
    write_index(tmp_path, [Shard("../../x.tar", 1, 2, 3)])
    server.files[f"/{INDEX}"] = (tmp_path / INDEX).read_bytes()
    with pytest.raises(UserError, match="not beside it"):
        make().find(f"{server.url}/*.tar")
    with pytest.raises(UserError, match="not beside it"):
        make(index=str(tmp_path)).find(f"{server.url}/*.tar")


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
    for module, protocol in (("s3fs", "s3"), ("gcsfs", "gs")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(_registry, protocol, raising=False)  # another test has had it loaded
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
