"""The members of a tar are those that Python's tarfile lists, whoever wrote it and however."""

import io
import os
import tarfile
from contextlib import suppress

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from streaming.making import END, gnu_tar, header, member, pax, python_tar, theorem
from webdataset.tariterators import base_plus_ext

from diffusion_trainer.streaming.damage import BadArchive, TooLarge, Truncated
from diffusion_trainer.streaming.scanning import scan
from diffusion_trainer.streaming.tar import MAX_HEADER, _pax, key_and_extension, members

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LETTERS = st.sampled_from("abcXYZ019._- +é本𝄞\n\t'\"%:")
PARTS = st.one_of(st.text(LETTERS, min_size=1, max_size=120), st.sampled_from(["p" * 40, "q" * 95, "é" * 50]))
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join)

LINES = st.text(LETTERS, max_size=30)


def listed(data: bytes) -> list[tuple]:
    """By Python's tarfile."""
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        return [(m.offset, m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]


def ours(data: bytes) -> list[tuple]:
    found = list(members(data))
    assert found == list(members(memoryview(data), checked=True))
    return [(m.start, m.name, m.offset, m.size) for m in found]


@st.composite
def entries(draw) -> tarfile.TarInfo | tuple[str, bytes]:
    name = draw(NAMES)
    assume(len(name.encode()) <= 300 and not name.endswith("/"))
    kind = draw(st.sampled_from("ffffe/lh"))
    if kind in "fe":
        return name, draw(st.binary(max_size=1100)) if kind == "f" else b""
    info = tarfile.TarInfo(name)
    info.type = {"/": tarfile.DIRTYPE, "l": tarfile.SYMTYPE, "h": tarfile.LNKTYPE}[kind]
    info.linkname = "" if kind == "/" else draw(NAMES)
    info.mtime = draw(st.sampled_from([0, 1.5, -3, 2**40]))  # pax has a record for those that ustar has no room for
    return info


@theorem(150)
@given(st.lists(entries(), max_size=8), st.sampled_from(FORMATS))
def test_members_are_what_tarfile_lists(content, format):
    try:
        data = python_tar(content, format)
    except ValueError:  # ustar cannot hold all names
        assume(False)
    assert ours(data) == listed(data)


@theorem(100)
@given(st.lists(st.tuples(st.sampled_from("xgf"), NAMES, LINES, st.binary(max_size=600)), max_size=4))
def test_pax_headers_speak_of_the_next_member_alone(content):
    """mtime, comments with newlines and equal signs, paths and sizes; global headers (g) say nothing that we need."""
    data = b""
    for k, (kind, path, comment, body) in enumerate(content):
        if kind == "x":  # the header's own size is wrong; the record's is true
            data += pax({"mtime": "1.25", "comment": f"{comment}\n=", "path": path, "size": str(len(body))})
            data += header(b"short", 0) + member("", body)[512:]
        else:
            data += pax({"comment": comment}, b"g") if kind == "g" else b""
            data += member(f"plain{k}", body)
    assert ours(data + END) == listed(data + END)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Files whose names need everything that tars have for long names; links; empty and binary files."""
    folder = tmp_path_factory.mktemp("tree")
    names = [
        "a.jpg",
        "a.cls",
        "b.JPG",
        "é本.txt",
        "d/" * 60 + "x.npy",
        f"{'n' * 120}.npy",
        f"{'p' * 140}/{'q' * 100}.json",
    ]
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes([k]) * 700 * k)
    (folder / "empty").mkdir()
    (folder / "m.link").symlink_to("t" * 130)
    os.link(folder / "a.cls", folder / "z.cls")
    return folder


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
@pytest.mark.parametrize("blocking", [1, 20, 64])
def test_members_of_the_tar_command(tree, format, blocking):
    # Names that v7 and ustar have no room for, whole or split at a slash; ustar's links have 100 bytes, too.
    left_out = {"v7": ("d", "nnn", "ppp", "m."), "ustar": ("nnn", "ppp", "m.")}.get(format, ())
    options = (f"--format={format}", "--sort=name", "-b", str(blocking), *(f"--exclude={o}*" for o in left_out))
    data = gnu_tar(tree, *options)
    found = ours(data)
    assert found == listed(data)
    assert len(found) == {"v7": 4, "ustar": 5}.get(format, 7)
    for _, name, offset, size in found:
        assert data[offset : offset + size] == (tree / name).read_bytes()


def test_a_global_pax_header_of_the_tar_command(tree):
    data = gnu_tar(tree, "--format=posix", "--pax-option=globexthdr.name=./g,comment=hi", "--sort=name")
    assert b"comment=hi" in data
    assert ours(data) == listed(data)


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"5", b"6"])
def test_links_folders_and_devices_have_no_data_whatever_their_size_says(kind):
    data = header(b"other", 700, kind) + member("a.txt", b"true") + END
    assert ours(data) == listed(data) == [(512, "a.txt", 1024, 4)]


def test_headers_from_before_ustar():
    """A NUL for the type; a folder is told by its slash; GNU keeps times where POSIX has the prefix."""
    data = member("d/", kind=b"\0", magic=b"") + member("d/a.txt", b"12", b"\0", magic=b"") + END
    assert ours(data) == listed(data) == [(512, "d/a.txt", 1024, 2)]
    (found,) = members(member("b.txt", b"12", magic=b"ustar  \0", prefix=b"14700000000") + END)
    assert found.name == "b.txt"


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 10_000])
def test_sizes_in_base_256(size):
    field = b"\x80" + size.to_bytes(11, "big")
    data = header(b"a.bin", field) + bytes([7]) * size + bytes(-size % 512) + member("b.bin", b"x") + END
    assert ours(data) == listed(data)


class Sparse:
    """A tar of 9 GiB of which only the headers exist."""

    def __init__(self, headers: dict[int, bytes], size: int):
        self.headers, self.size = headers, size

    def __len__(self):
        return self.size

    def __getitem__(self, piece):
        at, found = max((at, h) for at, h in self.headers.items() if at <= piece.start)
        return found[piece.start - at : piece.stop - at] or bytes(512)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_beyond_the_reach_of_octal_sizes(format):
    info = tarfile.TarInfo("huge.bin")
    info.size = 9 << 30
    first = info.tobuf(format)
    end = len(first) + info.size
    found = list(members(Sparse({0: first, end: member("b.txt", b"x")}, end + 2048), checked=True))
    assert [(m.name, m.offset, m.size) for m in found] == [
        ("huge.bin", len(first), 9 << 30),
        ("b.txt", end + 512, 1),
    ]


def test_checksums_of_old_programs_that_summed_signed_bytes():
    block = bytearray(header("é.txt".encode(), 0))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(b - 256 * (b > 127) for b in block)
    data = bytes(block) + END
    assert ours(data) == listed(data)


def test_names_that_are_not_utf_8_stay_apart():
    data = member(b"\xe8.txt", b"1") + member(b"\xe9.txt", b"2") + END
    first, second = (key_and_extension(m.name) for m in members(data))
    assert first != second


@theorem(150)
@given(st.data())
def test_whatever_the_bytes_it_ends_and_raises_damage_alone(data):
    content = data.draw(st.lists(entries(), min_size=1, max_size=4))
    whole = bytearray(python_tar(content, data.draw(st.sampled_from(FORMATS[1:]))))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(whole) - 1)) // 512 * 512 + data.draw(
            st.one_of(st.integers(0, 511), st.integers(124, 157))
        )
        whole[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b"0123456789-+ _xgLK\0=")))
    for checked in (False, True):
        with suppress(BadArchive, Truncated):
            for found in members(bytes(whole), checked):
                assert 0 <= found.start < found.offset <= found.offset + found.size <= len(whole)


class Patient(bytes):
    """Is not read for ever."""

    def __getitem__(self, piece):
        self.reads = getattr(self, "reads", 0) + 1
        assert self.reads < 100, "an endless loop"
        return super().__getitem__(piece)


@pytest.mark.parametrize("size", [b"-0000001000\0", b"-1000      \0", b"-0000000001\0"])
@pytest.mark.parametrize("kind", [b"0", b"5", b"g"])
def test_a_negative_size_is_no_header_and_no_endless_loop(size, kind):
    for checked in (False, True):
        with pytest.raises((BadArchive, Truncated)):
            list(members(Patient(member("a.txt", b"1") + header(b"b.txt", size, kind) + END), checked))


@pytest.mark.parametrize(
    "record", [b"99999 path=a\n", b"0 a=b\n", b"-5 a=b\n", b"a=b\n", b"9" * 5000 + b" a=b\n"], ids=range(5)
)
def test_pax_records_that_cannot_be_read(record):
    with pytest.raises(BadArchive):
        list(members(member("p", record, b"x") + member("a.txt", b"1") + END))


@pytest.mark.parametrize("size", ["-1", "1.5", "", "9" * 5000, "1_0", "٣"], ids=range(6))
def test_a_pax_size_that_is_none(size):
    with pytest.raises((BadArchive, Truncated)):
        list(members(pax({"size": size}) + member("a.txt", b"1") + END))


class Counted(bytes):
    """Adds up the bytes that are copied out of it, and out of what was."""

    copied = 0

    def __getitem__(self, piece):
        found = Counted(super().__getitem__(piece))
        Counted.copied += len(found)
        return found


def test_pax_records_cost_their_bytes_and_not_the_square_of_them():
    body = b"5 a=\n" * 4000 + b"12 path=b.c\n"
    assert _pax(Counted(body), 0) == {b"a": b"", b"path": b"b.c"}
    assert Counted.copied <= len(body)


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_an_extended_header_has_a_bound(kind, tmp_path):
    """Which of 900 GB, a file with holes, would else be read at once."""
    last = header(b"e", MAX_HEADER, kind) + bytes(MAX_HEADER) + member("a.txt", b"1") + END
    assert [m.size for m in members(last)] == [1]
    path = tmp_path / "a.tar"
    path.write_bytes(member("a.txt", b"1") + header(b"e", MAX_HEADER + 1, kind) + bytes(MAX_HEADER + 4096))
    found = scan(path)
    assert isinstance(found.damage, TooLarge)
    assert f"{MAX_HEADER + 1} bytes" in str(found.damage)


@theorem(300)
@given(NAMES)
def test_keys_and_extensions_are_webdatasets(name):
    """But for names that begin with a dot or an underscore pair, which are no samples, and empty extensions."""
    base = name.rpartition("/")[2]
    assume(not base.startswith((".", "__")) and not name.startswith("__") and "\n" not in name)
    key, extension = base_plus_ext(name)
    assume(extension != "" and (key is None or not key.endswith("/")))
    assert key_and_extension(name) == (None if key is None else (key, extension.lower()))


def test_keys_may_hold_line_ends():
    assert key_and_extension("a.b\nc/d\ne.F.g") == ("a.b\nc/d\ne", "f.g")


@pytest.mark.parametrize("name", [".hidden", "d/.hidden", "__meta__.json", "a", "d.x/a", "a.", "__meta__/x.json"])
def test_names_that_belong_to_no_sample(name):
    assert key_and_extension(name) is None
