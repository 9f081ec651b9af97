"""Shards at URLs that are damaged where they lie: the samples that it hits are damage, the others are what they are."""

import errno
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from streaming import flaky
from streaming.making import END, indexed, member, write_set
from streaming.stores import FIRST, MODES, NAMES, PIECE, contents, gets
from streaming.three_shards import folder, make, server, truth  # noqa: F401 (fixtures)

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming import files, remote
from diffusion_trainer.streaming.damage import BadChecksum, MissingShard, Truncated
from diffusion_trainer.streaming.index import OFFSETS, Shard
from diffusion_trainer.streaming.stores import LocalStore


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
def test_a_truncated_shard_may_begin_as_a_page_does(piece_bytes, server, make, tmp_path):
    (path,) = write_set(tmp_path / "b", [3])
    indexed(path, b"".join(member(f"{{3F2504E0}}-{i}.cls", b"%d" % i) for i in range(3)) + END)
    server.files |= {f"/b/{p.name}": p.read_bytes() for p in path.parent.iterdir()}
    server.files[f"/b/{path.name}"] = path.read_bytes()[:2048]
    found = contents(make(piece_bytes), f"{server.url}/b/*.tar")
    assert found == [path.read_bytes()[:1024], path.read_bytes()[1024:2048], b"truncated"]


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
    assert piece_bytes or server.count(FIRST) == 4  # what comes twice, and twice again, is what the store has


@MODES
def test_a_bit_that_is_flipped_on_the_way_is_no_damage(piece_bytes, server, folder, truth, make):
    """A piece has no checksum of its own, and lies in the cache as it came."""
    server.script[FIRST] = [flaky.flipped]
    assert contents(make(piece_bytes), f"{server.url}/*.tar") == truth
    fetched = server.count(FIRST)
    assert fetched == gets(folder, NAMES[0], piece_bytes) + (2 if piece_bytes else 1)  # the sample goes on in the next
    assert contents(make(piece_bytes), f"{server.url}/*.tar") == truth  # another process, which has the cache alone
    assert server.count(FIRST) == fetched


def flipped(path: Path, monkeypatch) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorter(path: Path, monkeypatch) -> None:
    os.truncate(path, path.stat().st_size // 2)


def unreadable(path: Path, monkeypatch) -> None:
    """As a disk says it of a bad block (of a shard: files beside it are not read in place)."""
    rotten, preadv = path.stat().st_ino, os.preadv

    def read(descriptor: int, *arguments) -> int:
        if os.fstat(descriptor).st_ino == rotten:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", read)


@MODES
@pytest.mark.parametrize("rot", [flipped, shorter, unreadable])
def test_what_rots_in_the_cache_is_fetched_once_more_and_then_believed(
    rot, piece_bytes, server, truth, make, monkeypatch
):
    """Shards and the files beside them. Were it the store's, it would be damage, or another index."""
    store = make(piece_bytes)
    assert contents(store, f"{server.url}/*.tar") == truth
    entries = list((Path(store.cache) / "entries").iterdir())
    assert len(entries) >= 9
    for path in entries:
        rot(path, monkeypatch)
    asked = len(server.requests)
    assert contents(make(piece_bytes), f"{server.url}/*.tar") == truth
    again = len(server.requests) - asked
    assert 3 < again <= len(entries) + 1  # index.json is asked for each time
    assert contents(make(piece_bytes), f"{server.url}/*.tar") == truth
    assert len(server.requests) == asked + again + 1


def test_a_cache_that_cannot_be_read_at_all_ends_the_run_as_one_that_may_be_started_again(server, make, monkeypatch):
    store = make()
    shard = store.find(f"{server.url}/*.tar")[0]

    def read(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", read)
    with pytest.raises(PassingError, match=r"data\.store\.cache=.* cannot be read: .*Input/output error"):
        store.read(shard, 0, memoryview(bytearray(10)))


@pytest.mark.parametrize("bad", [1, 2])
def test_a_sidecar_in_the_cache_that_cannot_be_read_is_fetched_again(server, make, monkeypatch, bad):
    """bad: reads that the node's disk fails."""
    store = make()
    shard = store.find(f"{server.url}/*.tar")[0]
    kept, failed = store.sidecar(shard, OFFSETS), []

    class Ill(io.FileIO):
        def readall(self):
            if len(failed) < bad:
                failed.append(self)
                raise OSError(errno.EIO, "Input/output error")
            return super().readall()

    monkeypatch.setattr(files, "open", lambda *arguments: io.BufferedReader(Ill(*arguments)), raising=False)
    if bad == 1:
        assert store.sidecar(shard, OFFSETS) == kept
    else:
        with pytest.raises(PassingError, match=r"data\.store\.cache=.* cannot be read: .*Input/output error"):
            store.sidecar(shard, OFFSETS)


@MODES
def test_another_shard_of_the_same_size_is_an_error_and_no_damage(piece_bytes, server, make):
    name, draws, out = NAMES[1], np.random.default_rng(1), io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(server.files[f"/{name}"])) as old, tarfile.open(fileobj=out, mode="w") as new:
        for each in old:
            new.addfile(each, io.BytesIO(draws.bytes(each.size)))
    assert len(out.getvalue()) == len(server.files[f"/{name}"])
    server.files[f"/{name}"] = out.getvalue()
    with pytest.raises(UserError, match=f"{name} is not what its index describes"):
        contents(make(piece_bytes), f"{server.url}/*.tar")


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
    with pytest.raises(UserError, match=rf"neither .*{NAMES[0]} is there nor .*index.json"):
        store.read(shard, 0, memoryview(bytearray(10)))


def test_a_missing_shard_of_an_index_elsewhere_is_damage_while_others_are_there(server, folder, truth, make):
    for name in [name for name in server.files if not name.endswith(".tar")]:
        del server.files[name]
    del server.files[FIRST]
    store = make(index=str(folder))
    assert contents(store, f"{server.url}/*.tar") == [*[b"missing_shard"] * 10, *truth[10:]]
    server.files.clear()
    with pytest.raises(UserError, match=r"neither .*x-000000.tar is there nor .*x-000001.tar nor .*x-0"):
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


def test_reading_beyond_the_end_of_a_shard_is_truncation(server, make):
    for piece_bytes in (None, PIECE):
        store = make(piece_bytes)
        shard = store.find(f"{server.url}/*.tar")[0]
        for offset in (shard.size - 4, shard.size, shard.size + 10 * PIECE):
            with pytest.raises(Truncated):
                store.read(shard, offset, memoryview(bytearray(8)))


def test_missing_index_files_are_named_with_their_remedy(server, make):
    store = make()
    shard = store.find(f"{server.url}/*.tar")[0]
    del server.files[f"{FIRST}.idx"]
    with pytest.raises(UserError, match=r"x-000000.tar.idx is missing.*diffusion-trainer index .*x-000000.tar"):
        store.sidecar(shard, ".idx")
    with pytest.raises(UserError, match="image_sizes=true"):
        store.sidecar(shard, ".size")


def test_a_shard_that_is_said_to_have_no_bytes_is_truncated(server, make):
    for piece_bytes in (None, 4096):
        with pytest.raises(Truncated):
            make(piece_bytes).read(Shard(f"{server.url}/x-000000.tar", 0, 0, 0), 0, memoryview(bytearray(1)))


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


def test_an_index_without_end_is_not_taken(server, make, monkeypatch):
    monkeypatch.setattr(remote, "MAX_SMALL", 1 << 20)
    server.always["/index.json"] = flaky.endless
    with pytest.raises(UserError, match=r"index.json: more than 1048576 bytes came"):
        make().find(f"{server.url}/*.tar")
    assert server.count("/index.json") == 2
    assert server.sent < 150  # of the 200 that it had for us
