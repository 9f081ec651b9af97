"""A sample is read at once, and is what was indexed or damaged."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from streaming.making import (
    END,
    Number,
    Row,
    indexed,
    member,
    members_of,
    python_tar,
    row,
    shard_bytes,
    shard_data,
    write_set,
)

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming import samples as reading
from diffusion_trainer.streaming import stores
from diffusion_trainer.streaming.damage import BadChecksum, MissingShard, TooLarge, Truncated
from diffusion_trainer.streaming.index import Shard
from diffusion_trainer.streaming.samples import Samples
from diffusion_trainer.streaming.scanning import scan, write_sidecars
from diffusion_trainer.streaming.stores import LocalStore

COUNTS = [3, 0, 5]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_set(tmp_path, COUNTS)
    return tmp_path


def opened(folder: Path, max_bytes: int = 1 << 20) -> Samples:
    store = LocalStore()
    return Samples(store.find(f"{folder}/*.tar"), store, max_bytes)


def test_every_sample_is_where_the_index_says(folder):
    samples = opened(folder)
    places = [(k, i) for k, count in enumerate(COUNTS) for i in range(count)]
    for number in (*range(8), 5, 0, 7, 2):  # in order and not
        k, i = places[number]
        assert {e: bytes(d) for e, d in samples.read(k, i).items()} == {n[7:]: d for n, d in members_of(number)}
        assert samples.key(k, i) == f"{number:06d}"
        shard, first, last = samples.span(k, i)
        assert shard == samples.shards[k]
        assert Path(shard.url).read_bytes()[first:last] == bytes(samples.bytes_of(k, i))


def test_a_large_sample_after_a_small_one(tmp_path):
    big = os.urandom(300_000)
    indexed(tmp_path / "x.tar", python_tar([("a.x", b"1"), ("b.x", big), ("c.x", b"3")]))
    samples = opened(tmp_path)
    assert [bytes(samples.read(0, i)["x"]) for i in (0, 1, 2)] == [b"1", big, b"3"]
    with pytest.raises(TooLarge, match="300544"):
        opened(tmp_path, 300_543).read(0, 1)
    assert len(opened(tmp_path, 300_544).read(0, 1)["x"]) == 300_000


def loads(samples, monkeypatch) -> list[str]:
    """Each shard whose table is loaded from here on."""
    found, sidecar = [], samples.store.sidecar
    monkeypatch.setattr(
        samples.store, "sidecar", lambda shard, suffix: found.append(shard.url) or sidecar(shard, suffix)
    )
    return found


@pytest.mark.parametrize("room", [1, 3, 4, 5])
def test_lanes_that_take_turns_load_each_table_a_few_times_however_little_room_there_is(tmp_path, monkeypatch, room):
    monkeypatch.setattr(reading, "MAX_TABLE_BYTES", 32 * room)  # of shards with two samples
    write_set(tmp_path, [2] * 6)
    samples = opened(tmp_path)
    found = loads(samples, monkeypatch)
    for _ in range(50):
        for k in range(6):
            samples.bytes_of(k, 0)
    assert len(found) <= 2 * 6 * 4
    assert len(samples._tables) == 6


def test_a_shard_that_is_read_now_and_then_among_many_gets_no_more_room(tmp_path, monkeypatch):
    """Two tables are needed at a time, whatever has been read before."""
    monkeypatch.setattr(reading, "MAX_TABLE_BYTES", 32 * 4)  # of shards with two samples
    write_set(tmp_path, [2] * 40)
    samples = opened(tmp_path)
    for k in range(1, 40):
        samples.bytes_of(k, 0), samples.bytes_of(k, 1), samples.bytes_of(0, 0)
    assert len(samples._tables) == 4


def test_what_comes_again_after_an_epoch_gets_no_more_room(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_TABLE_BYTES", 64)
    monkeypatch.setattr(reading, "SOON", 4)
    write_set(tmp_path, [2] * 6)
    samples = opened(tmp_path)
    for _ in range(5):
        for k in range(6):
            samples.bytes_of(k, 0), samples.bytes_of(k, 1)
    assert len(samples._tables) == 2


def test_more_shards_than_tables_and_open_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_TABLE_BYTES", 64)  # of two shards with two samples
    monkeypatch.setattr(reading, "SOON", 1)
    monkeypatch.setattr(stores, "MAX_OPEN", 2)
    write_set(tmp_path, [2] * 6)
    samples = opened(tmp_path)
    for number in (0, 3, 10, 1, 11, 5, 0):
        assert bytes(samples.read(number // 2, number % 2)["cls"]) == b"%d" % number
    assert (len(samples._tables), len(samples.store._files)) == (2, 2)
    inside = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if fd.isdigit() and os.path.exists(f"/proc/self/fd/{fd}")
    }
    assert sum(path.startswith(str(tmp_path)) for path in inside) == 2


def test_any_bit_of_a_sample_that_differs_is_seen(folder):
    samples, path = opened(folder), folder / "x-000.tar"
    whole = path.read_bytes()
    _, first, last = samples.span(0, 1)
    for at in {first, last - 1, *np.random.default_rng(0).integers(first, last, 20).tolist()}:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(BadChecksum):
            samples.read(0, 1)
        assert bytes(samples.read(0, 2)["cls"]) == b"2"
        assert bytes(samples.read(0, 0)["cls"]) == b"0"


def test_a_shard_that_is_shorter_or_gone_is_damage(folder):
    os.truncate(folder / "x-000.tar", 3000)
    os.unlink(folder / "x-002.tar")
    samples = opened(folder)
    assert bytes(samples.read(0, 0)["cls"]) == b"0"
    with pytest.raises(Truncated, match=r"3000 bytes, its index says \d+"):
        samples.read(0, 1)
    with pytest.raises(MissingShard):
        samples.read(2, 0)


def test_a_shard_that_was_written_again_longer_is_an_error(folder):
    shutil.copy(folder / "x-002.tar", folder / "x-000.tar")
    with pytest.raises(UserError, match=r"x-000\.tar is not what its index describes.*diffusion-trainer index"):
        opened(folder).read(0, 0)


@pytest.mark.parametrize("suffix", [".idx", ".crc"])
@pytest.mark.parametrize("change", [None, -1, -4, -8, 1, 4, 8, -1000])
def test_a_sidecar_that_is_missing_or_of_another_length_is_an_error_that_names_the_command(folder, suffix, change):
    path = folder / f"x-000.tar{suffix}"
    data = path.read_bytes()
    if change is None:
        path.unlink()
    else:
        path.write_bytes((data + bytes(8))[: max(0, len(data) + change)])
    with pytest.raises(UserError, match=r"x-000\.tar.*diffusion-trainer index"):
        opened(folder).read(0, 0)


def test_a_sidecar_that_speaks_of_bytes_beyond_the_shard_is_an_error(folder):
    path = folder / "x-000.tar.idx"
    offsets = np.frombuffer(path.read_bytes(), "<u8").copy()
    offsets[-1] += 1 << 20
    path.write_bytes(offsets.tobytes())
    with pytest.raises(UserError, match="diffusion-trainer index"):
        opened(folder).read(0, 0)


@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_a_bit_in_the_offsets_is_an_error(folder, bit):
    path = folder / "x-000.tar.idx"
    offsets = np.frombuffer(path.read_bytes(), "<u8").copy()
    offsets[1] ^= np.uint64(1) << np.uint64(bit)
    path.write_bytes(offsets.tobytes())
    with pytest.raises(UserError, match=r"x-000\.tar.*diffusion-trainer index"):
        opened(folder).read(0, 0)


@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_a_bit_in_the_offsets_of_an_index_without_their_checksum_is_damage_and_nothing_else(folder, bit):
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shardlist"]:
        del entry["offsets"]
    (folder / "index.json").write_text(json.dumps(index))
    path = folder / "x-000.tar.idx"
    offsets = np.frombuffer(path.read_bytes(), "<u8").copy()
    offsets[1] ^= np.uint64(1) << np.uint64(bit)
    path.write_bytes(offsets.tobytes())
    for i in (0, 1):
        with pytest.raises((BadChecksum, Truncated, TooLarge, UserError)):
            opened(folder).read(0, i)
    assert bytes(opened(folder).read(2, 0)["cls"]) == b"3"


def test_a_sidecar_that_cannot_be_opened_is_told_to_the_user(folder):
    path = folder / "x-000.tar.idx"
    path.unlink()
    path.mkdir()  # as good as one without permission, which root would have
    with pytest.raises(UserError, match=r"x-000\.tar\.idx"):
        opened(folder).read(0, 0)


def test_reads_that_the_system_cuts_short_are_continued(folder, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:700]], at))
    assert bytes(opened(folder).read(2, 4)["cls"]) == b"7"


def names(shards: list[Shard]) -> list[str]:
    return [Path(s.url).name[2:5] for s in shards]


def test_patterns_find_the_indexed_shards_in_order(folder):
    find = LocalStore().find
    assert names(find(f"{folder}/*.tar")) == names(find(f"{folder}/x-*")) == ["000", "001", "002"]
    assert names(find(f"{folder}/x-{{000,002}}.tar")) == ["000", "002"]
    assert names(find(f"{folder}/x-001.tar")) == ["001"]
    assert [s.samples for s in find(f"{folder}/*.tar")] == COUNTS
    assert names(find(f"{folder.parent}/{folder.name[:-1]}?/*.tar")) == ["000", "001", "002"]
    (folder / "x-001.tar").unlink()
    assert names(find(f"{folder}/*.tar")) == ["000", "001", "002"]  # that it is gone is damage


def test_shards_that_cannot_be_used_are_refused_before_the_start(folder):
    find = LocalStore().find
    (folder / "y.tar").write_bytes(member("a.x", b"1") + END)
    for pattern, message in [
        ("*.tar", r"y\.tar has no index; make it: diffusion-trainer index"),
        ("z*.tar", "no file matches"),
        ("x-{000..005}.tar", r"no file matches .*x-003\.tar"),
        ("", "is a folder"),
        ("index.json", r"is their index; name the files: .*/\*\.tar"),
    ]:
        with pytest.raises(UserError, match=message):
            find(f"{folder}/{pattern}")
    with pytest.raises(UserError, match="not a local path"):
        find("s3://bucket/x.tar")


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    write_set(tmp_path / "run[1]", [2])
    assert names(LocalStore().find(f"{tmp_path}/run[1]/*.tar")) == ["000"]


def test_a_shard_that_two_patterns_name_is_one_shard(folder):
    """Else its samples would come twice an epoch without a word."""
    assert shard_data([f"{folder}/*.tar", f"{folder}/x-000.tar"]).count == sum(COUNTS)


def test_sidecars_of_another_shard_than_the_index_lists_are_an_error(folder):
    """Samples of one size, as latents are: only the checksums tell, and they were written again with the shard."""
    path = folder / "x-000.tar"
    path.write_bytes(shard_bytes(range(50, 53)))
    write_sidecars(path, scan(path))
    with pytest.raises(UserError, match="diffusion-trainer index"):
        opened(folder).read(0, 0)


@pytest.mark.parametrize("offset", [0, 5000, 2**63, 2**64 - 1])
def test_offsets_that_do_not_ascend_are_an_error(folder, offset):
    """They may be a stranger's: no size may be less than nothing."""
    path = folder / "x-000.tar.idx"
    offsets = np.frombuffer(path.read_bytes(), "<u8").copy()
    offsets[2 if offset == 0 else 0] = offset
    path.write_bytes(offsets.tobytes())
    with pytest.raises(UserError, match="diffusion-trainer index"):
        opened(folder).read(0, 0)


@pytest.mark.parametrize("url", ["../secret/x-000.tar", "{}/secret/x-000.tar", ".."])
def test_an_index_names_files_of_its_folder_alone(tmp_path, url):
    write_set(tmp_path / "secret", [2])
    write_set(tmp_path / "public", [2])
    index = tmp_path / "public" / "index.json"
    index.write_text(index.read_text().replace("x-000.tar", url.format(tmp_path)))
    with pytest.raises(UserError, match="not beside it"):
        LocalStore().find(f"{tmp_path}/public/*.tar")


def test_data_of_the_set_in_its_order(folder):
    data = shard_data(f"{folder}/*.tar", fields={"image": Row(), "label": Number()})
    assert data.count == 8
    assert data.batch([7, 0, 3])["label"].tolist() == [7, 0, 3]
    assert data.batch([5])["image"].tolist() == [row(5).tolist()]
    assert data.first(100)["label"].tolist() == list(range(8))
    once = [[b["label"].tolist() for b in data.once(3, rank, 2)] for rank in (0, 1)]
    assert once == [[[0, 2, 4], [6]], [[1, 3, 5], [7]]]
    assert list(data.labelled(6)) == [6]
    (folder / "x-002.tar").unlink()
    with pytest.raises(UserError, match=r"x-002\.tar, sample 2 \(missing_shard\)"):
        shard_data(f"{folder}/*.tar").batch([5])


def test_the_fingerprint_tells_sets_apart_and_not_where_they_lie(tmp_path):
    for name, counts in (("a", [2, 3]), ("b", [2, 3]), ("c", [3, 2]), ("d", [2, 3, 1])):
        write_set(tmp_path / name, counts)
    write_set(tmp_path / "e", [2, 3], first=1)
    a, b, c, d, e = (shard_data(f"{tmp_path}/{name}/*.tar").fingerprint for name in "abcde")
    assert a == b
    assert len({a, c, d, e}) == 4
