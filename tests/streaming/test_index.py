"""The index says where samples lie and what they sum to, and takes nothing incomplete for whole."""

import io
import json
import os
import tarfile
import zlib
from contextlib import suppress
from itertools import groupby, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streaming.making import END, gnu_tar, member, npy, pax, python_tar, shard_bytes, theorem, webdataset_tar

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.damage import BadArchive, Damage, Truncated
from diffusion_trainer.streaming.index import Shard, entry_of, parse_index, read_index, write_index
from diffusion_trainer.streaming.scanning import Scan, scan
from diffusion_trainer.streaming.tar import key_and_extension

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def scanned(data: bytes) -> Scan:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        path.write_bytes(data)
        return scan(path)


def by_hand(data: bytes) -> tuple[list[int], list[dict[str, bytes]]]:
    """Offsets of samples and their members, by Python's tarfile."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = [m for m in tar.getmembers() if m.isreg() and key_and_extension(m.name)]
        groups = [list(group) for _, group in groupby(files, lambda m: key_and_extension(m.name)[0])]
        read = [{key_and_extension(m.name)[1]: tar.extractfile(m).read() for m in group} for group in groups]
    ends = [files[-1].offset_data + -(-files[-1].size // 512) * 512] if files else [0]
    return [group[0].offset for group in groups] + ends, read


@st.composite
def sets(draw) -> list[tuple[str, bytes]]:
    """Members of samples with long and short names, hidden ones between."""
    out = []
    for k in range(draw(st.integers(0, 5))):
        key = f"{draw(st.sampled_from(['', 'd/', 'v' * 120 + '/']))}{k}{draw(st.sampled_from(['', 'é', 'n' * 110]))}"
        for extension in draw(st.lists(st.sampled_from(["cls", "JPG", "a.npy", "e" * 90]), min_size=1, unique=True)):
            out.append((f"{key}.{extension}", draw(st.binary(max_size=1100))))
        out += [("README", b"no sample")] * draw(st.integers(0, 1))
    return out


@theorem(100)
@given(sets(), st.sampled_from(FORMATS[1:]))
def test_offsets_checksums_and_fields_are_those_of_a_reading_by_hand(content, format):
    data = python_tar(content, format)
    offsets, read = by_hand(data)
    found = scanned(data)
    assert found.damage is None
    assert len(found.checksums) == len(read)
    assert found.offsets.tolist()[:-1] == offsets[:-1]
    assert found.checksums.tolist() == [zlib.crc32(data[a:b]) for a, b in pairwise(found.offsets.tolist())]
    assert (found.size, found.crc32) == (len(data), zlib.crc32(data))
    assert sorted(e for e, n in found.fields.items() for _ in range(n)) == sorted(tuple(sorted(s)) for s in read)
    assert (found.offsets.dtype, found.checksums.dtype) == (np.dtype("<u8"), np.dtype("<u4"))


TARS = {
    "plain": b"".join(member(f"{k}.{e}", b"1" * 600) for k in range(4) for e in "ab") + END,
    "pax": b"".join(pax({"path": f"{k}.{e}", "mtime": "1"}) + member("s", b"1" * 600) for k in range(3) for e in "ab")
    + END,
    "gnu": python_tar([(f"{'n' * 110}{k}.{e}", b"1" * 600) for k in range(3) for e in "ab"], tarfile.GNU_FORMAT),
}
# of two members alike in each sample


@pytest.mark.parametrize("tar", TARS)
def test_a_tar_that_is_cut_anywhere_is_damaged_and_its_samples_are_whole(tar):
    """At every border of a block, beside it, and within: what is found are the first of the true samples, all of
    those behind which another one's first member is whole. Of the end mark one block is enough."""
    data = TARS[tar]
    offsets, read = by_hand(data)
    last = offsets[-1]
    for border in range(0, last + 512, 512):
        for cut in {c for c in (border - 1, border, border + 1, border + 100) if 0 <= c < last + 512}:
            found = scanned(data[:cut])
            assert isinstance(found.damage, Truncated), (cut, found.damage)
            n = len(found.checksums)
            assert found.offsets.tolist() == offsets[: n + 1] or not n
            assert sum((a + b) // 2 <= cut for a, b in pairwise(offsets[1:])) <= n <= sum(b <= cut for b in offsets[1:])
            assert sum(found.fields.values()) == n
    found = scanned(data[: last + 512])
    assert found.damage is None
    assert len(found.checksums) == len(read)


def test_what_is_no_tar_is_damage(tmp_path):
    html = b"<!DOCTYPE html><html><body>" + b"<p>503 Service Unavailable</p>" * 100
    for data, kind in [
        (b"", Truncated),
        (b"text", Truncated),
        (html, BadArchive),
        (os.urandom(5000), BadArchive),
        (b"\0" * 1024 + b"x", BadArchive),
    ]:
        found = scanned(data)
        assert isinstance(found.damage, kind), data[:20]
        assert (found.offsets.tolist(), found.checksums.tolist(), found.size) == ([0], [], len(data))
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "none.tar")


@pytest.mark.parametrize("data", [bytes(1024), bytes(10240), python_tar([]), python_tar([("README", b"1")])])
def test_a_tar_without_samples_is_whole(data):
    found = scanned(data)
    assert (found.damage, found.checksums.tolist(), len(found.offsets)) == (None, [], 1)


def sample(n: int) -> bytes:
    return shard_bytes([n])[: -len(END)]


def test_a_bit_in_a_header_ends_the_samples_before_it():
    whole = bytearray(shard_bytes(range(4)))
    offsets, _ = by_hand(bytes(whole))
    whole[offsets[2] + 3] ^= 1
    found = scanned(bytes(whole))
    assert isinstance(found.damage, BadArchive)
    assert found.offsets.tolist() == offsets[:2]  # sample 1 may have lost a member


def test_a_block_of_zeros_in_the_middle_is_no_end():
    offsets, _ = by_hand(shard_bytes(range(4)))
    found = scanned(sample(0) + sample(1) + bytes(512) + sample(3) + END)
    assert isinstance(found.damage, BadArchive)
    assert found.offsets.tolist() == offsets[:2]


def test_joined_tars_are_damaged_and_say_so():
    found = scanned(shard_bytes([0, 1]) + shard_bytes([2, 3]))
    assert "joined" in str(found.damage)
    assert 1 <= len(found.checksums) <= 2


def test_members_that_do_not_lie_together():
    found = scanned(sample(0) + sample(1) + member("000000.txt", b"late") + END)
    assert isinstance(found.damage, BadArchive)
    assert "000000" in str(found.damage)
    assert "--sort=name" in str(found.damage)
    assert len(found.checksums) == 1


@pytest.mark.parametrize("second", ["a.jpg", "a.JPG"])
def test_a_member_that_comes_twice(second):
    found = scanned(member("0.jpg") + member("a.jpg", b"1") + member(second, b"2") + END)
    assert isinstance(found.damage, BadArchive)
    assert second in str(found.damage)
    assert len(found.checksums) == 1


@pytest.mark.parametrize("last", [b"5", b"2", b"1", b"g"], ids=["folder", "symlink", "link", "global"])
def test_what_is_no_file_may_come_last(last):
    trailing = pax({"comment": "x"}, b"g") if last == b"g" else member("z", kind=last)
    found = scanned(sample(0) + sample(1) + trailing + END)
    assert found.damage is None
    assert len(found.checksums) == 2


def test_a_folder_as_the_tar_command_writes_it(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.cls").write_bytes(b"%d" % k)
        (tmp_path / f"{k}.npy").write_bytes(npy(np.arange(k)))
    (tmp_path / "z").mkdir()
    for format in ("gnu", "posix", "ustar"):
        found = scanned(gnu_tar(tmp_path, "--sort=name", f"--format={format}"))
        assert found.damage is None
        assert found.fields == {("cls", "npy"): 3}


def test_shards_of_webdataset():
    found = scanned(webdataset_tar({"__key__": f"d/{k}", "cls": k, "bin": bytes(600)} for k in range(5)))
    assert found.damage is None
    assert found.fields == {("bin", "cls"): 5}


def test_a_file_that_shrinks_while_it_is_read_is_an_error_of_the_kinds_announced(tmp_path, monkeypatch):
    pread, path = os.pread, tmp_path / "x.tar"
    for reads in range(8):
        path.write_bytes(shard_bytes(range(3)))
        left = iter(range(reads))

        def shrinking(descriptor, size, offset, left=left):
            if next(left, None) is None:
                os.truncate(path, 700)
            return pread(descriptor, size, offset)

        monkeypatch.setattr(os, "pread", shrinking)
        with suppress(OSError):
            assert isinstance(scan(path).damage, Damage)


def test_index_json_is_wids_layout_sorted_and_merged(tmp_path):
    write_index(tmp_path, [Shard("b.tar", 2, 2048, 7), Shard("a.tar", 1, 1024, 5)])
    write_index(tmp_path, [Shard("b.tar", 3, 4096, 9), Shard("c.tar", 0, 1024, 0)])
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "shardlist": [
            {"url": "a.tar", "nsamples": 1, "filesize": 1024, "crc32": 5},
            {"url": "b.tar", "nsamples": 3, "filesize": 4096, "crc32": 9},
            {"url": "c.tar", "nsamples": 0, "filesize": 1024, "crc32": 0},
        ],
    }
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]
    assert read_index(tmp_path / "index.json")[1] == Shard("b.tar", 3, 4096, 9)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"shardlist": 3}', '{"shardlist": [{"url": "a"}]}', "null", "\xff", "[" * 10**5],
    ids=lambda text: text[:20],
)
def test_an_index_that_is_none_is_refused_with_the_command(text):
    with pytest.raises(UserError, match=r"here is no index of shards .*diffusion-trainer index"):
        parse_index(text.encode("latin-1"), "here")


LIES = {
    "nsamples": [-5, 5, 10**18, 10**25, True, 1.0, 2.5, "2", None, float("inf"), float("nan")],  # five have no room
    "filesize": [-1, 0, 10**25, float("inf"), float("nan"), "2048", None],
    "crc32": [-1, 1 << 32, "abc", float("inf"), None],
    "offsets": [-1, 1 << 32, "abc", float("inf"), False],
    "checksums": [-1, 1 << 32, "abc", float("inf"), False],
    "url": [
        None,
        5,
        "",
        ".",
        "..",
        "x\0.tar",
        "../x.tar",
        "/x.tar",
        "a/x.tar",
        ["x.tar"],
        "\ud800.tar",
        "pipe:touch x; cat y.tar",
    ],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in LIES.items() for value in values])
def test_an_index_that_lies_is_refused_with_the_command(key, value):
    entry = {"url": "x.tar", "nsamples": 2, "filesize": 2048, "crc32": 7, "offsets": 9, "checksums": 8}
    assert parse_index(json.dumps({"shardlist": [entry]}).encode(), "here") == [Shard("x.tar", 2, 2048, 7, 9, 8)]
    with pytest.raises(UserError, match=r"here is no index of shards .*diffusion-trainer index"):
        parse_index(json.dumps({"shardlist": [entry | {key: value}]}).encode(), "here")


def test_an_index_that_names_a_shard_twice_is_refused():
    """Either may be true."""
    entries = [entry_of(Shard("x.tar", samples, 4096, 1)) for samples in (1, 3)]
    with pytest.raises(UserError, match="names a shard twice"):
        parse_index(json.dumps({"shardlist": entries}).encode(), "here")


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax"])
def test_files_with_holes_are_damage_that_says_what_to_do(tmp_path, format):
    """The tar command stores them as maps and pieces; taken for files they would be other bytes, or none."""
    (tmp_path / "0.txt").write_bytes(b"whole")
    for k in (1, 2):
        with open(tmp_path / f"{k}.npy", "wb") as file:
            file.write(b"head")
            file.truncate(1 << 20)
    found = scanned(gnu_tar(tmp_path, "-S", f"--format={format}", "--sort=name", "--exclude=x"))
    assert isinstance(found.damage, BadArchive)
    assert "--sparse" in str(found.damage)
    assert found.fields == {}  # of the whole sample before it is not known whether it goes on
    assert scanned(gnu_tar(tmp_path, f"--format={format}", "--sort=name")).damage is None


def test_what_a_killed_writer_of_the_index_left_is_removed(tmp_path):
    part = tmp_path / f".index.json.{'0f' * 16}.part"
    part.write_bytes(b"half of")
    write_index(tmp_path, [Shard("a.tar", 1, 1024, 5)])
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]
