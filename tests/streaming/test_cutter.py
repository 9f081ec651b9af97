"""The short cut through samples that look alike finds what reading every header finds, whatever it has seen before."""

import io
import tarfile
from itertools import product

import pytest
from streaming.making import END, header, member, pax, python_tar, shard_bytes

from diffusion_trainer.streaming import cutter
from diffusion_trainer.streaming.cutter import MAX_LAYOUTS, MAX_MEMBERS, Cutter
from diffusion_trainer.streaming.damage import Truncated
from diffusion_trainer.streaming.tar import key_and_extension, members

# All of one length, so that samples of one size differ in nothing but what their headers mean.
IGNORED = (
    "k/.hab.y", "k/__cd.y", "k/abc/.y", "k/abcdef", "k/abcd/y", "k/abc\0.y", "k/abc\0/y", "k\0/abc.y", "____/a.y"
)  # fmt: skip


def extended(name: str, data: bytes) -> dict[str, bytes]:
    """Members whose name or type does not stand in their header as it usually does."""
    return {
        "pax": pax({"path": name}) + member("k/abcd.z", data),
        "pax time": pax({"time": name}) + member("k/abcd.z", data),
        "gnu": member("././@LongLink", name.encode() + b"\0", b"L") + member("k/abcd.z", data),
        "prefix": member(name[2:].rjust(len(name), "/"), data, prefix=b"k"),
        "old": member(name, data, b"\0"),
        "size in other words": header(name.encode(), b"%10o \0" % len(data)) + member("", data)[512:],
    }


def units() -> dict[tuple, bytes]:
    """What a sample may have besides its first member: another one, or what has a header and is none."""
    found = {("nothing",): b""}
    for data in (b"", b"1"):
        found |= {("field", how, data): unit for how, unit in extended("k/abcd.y", data).items()}
        for name in ("k/abcd.y", "k/abcd.Y", "k/abcd.z", "k/bcd.zy", *IGNORED):
            found[name, "file", data] = member(name, data)
    for name, kind in product(("k/abcd.y", "k/abcdef"), (b"2", b"5")):
        found[name, kind] = member(name, kind=kind)
    found["global"] = pax({"comment": "x"}, b"g") + member("k/abcdef")
    return found


def valid(named: list[tuple[str, str]]) -> bool:
    """Of one key, each extension once: all that an index takes for a sample."""
    return len({key for key, _ in named}) == 1 and len(dict(map(reversed, named))) == len(named)


def samples() -> dict[tuple, bytes]:
    """As they lie between two offsets of an index."""
    lasts = {"": b"", "k/abcd.z": member("k/abcd.z"), "k/abcdef": member("k/abcdef")}
    found = {}
    for (what, unit), (last, end) in product(units().items(), lasts.items()):
        sample = member("k/abcd.x") + unit + end
        if valid([n for m in members(sample) if (n := key_and_extension(m.name))]):
            found[what, last] = sample
            found[what, last, "badc"] = sample.replace(b"k/abcd", b"k/badc")  # the checksums stay
    return found


def truth(sample: bytes) -> dict[str, bytes]:
    """By Python's tarfile."""
    with tarfile.open(fileobj=io.BytesIO(sample + END)) as tar:
        found = [(key_and_extension(m.name), tar.extractfile(m).read()) for m in tar.getmembers() if m.isreg()]
    return {named[1]: data for named, data in found if named}


ALL = samples()
TRUTH = {what: truth(sample) for what, sample in ALL.items()}


@pytest.mark.parametrize("size", sorted({len(sample) for sample in ALL.values()}))
def test_no_sample_leads_astray_in_another_one_of_its_size(size):
    alike = [what for what, sample in ALL.items() if len(sample) == size]
    for first, second in product(alike, alike):
        cut = Cutter()
        for what in (first, first, second, second, first):
            assert {e: bytes(data) for e, data in cut(memoryview(ALL[what])).items()} == TRUTH[what], (first, what)


def learnt(*samples: bytes) -> Cutter:
    """What has seen each of them twice: it learns of the second."""
    cut = Cutter()
    for sample in samples:
        cut(memoryview(sample))
        cut(memoryview(sample))
    return cut


def matches(cut: Cutter, sample: bytes) -> bool:
    """Whether it need not look at the headers one by one."""
    return any(layout.match(memoryview(sample)) for layout in cut._known.get(len(sample), ()))


def test_a_folder_and_an_empty_member_in_its_place():
    cut = learnt(member("a.x", b"1") + member("a", kind=b"5"))
    assert list(cut(memoryview(member("b.x", b"1") + member("b.y")))) == ["x", "y"]


def test_a_hidden_member_where_another_sample_has_a_field():
    cut = learnt(member("k/a1.x") + member("k/a1.y"))
    assert list(cut(memoryview(member("k/a2.x") + member("k/a/.y")))) == ["x"]


def test_a_member_that_comes_twice_is_its_last_and_teaches_nothing():
    """Its first one lies between those that are known: another sample may have anything there."""
    twice = member("a.x", b"1") + member("a.y", b"2") + member("a.x", b"3")
    cut = learnt(twice)
    assert {e: bytes(d) for e, d in cut(memoryview(twice)).items()} == {"x": b"3", "y": b"2"}
    assert not cut._known


def test_it_does_take_the_short_cut():
    """Else it would be slow without a word; data that look like headers do not lead it astray."""
    first, second = (memoryview(shard_bytes([n])[: -len(END)]) for n in (1, 2))
    cut = learnt(first)
    assert matches(cut, second)
    broken = bytearray(second)
    broken[148:156] = bytes(8)  # the checksum of a header, at which it does not look
    assert {e: bytes(d) for e, d in cut(memoryview(broken)).items()} == truth(bytes(second))
    inner = python_tar([("q.x", b"2"), ("q.y", b"3")])
    assert (
        list(cut(memoryview(member("a.tar", inner))))
        == ["tar"]
        == [m.name[2:] for m in members(member("b.tar", inner))]
    )


def test_samples_of_a_size_that_lie_in_some_ways_are_all_learnt():
    """Labels of 1, 2 and 3 digits take the same room."""
    ways = [member("k/a.x", b"0" * n) + member("k/a.y", b"1" * (9 - n)) for n in range(1, 2 + MAX_LAYOUTS)]
    cut = learnt(*ways)
    assert [matches(cut, way) for way in ways] == [True] * MAX_LAYOUTS + [False]
    for way in ways * 2:
        assert {e: bytes(data) for e, data in cut(memoryview(way)).items()} == truth(way)


def test_sizes_that_vary_teach_nothing_and_plain_headers_are_read_at_once(monkeypatch):
    """JPEGs: a layout for each would be made, and never fit."""
    monkeypatch.setattr(cutter, "entries", None)
    cut = Cutter()
    for n in range(1, 500):
        sample = member(f"k/{n}.JPG", bytes(n)) + member(f"k/{n}.cls", b"1")
        assert {e: bytes(d) for e, d in cut(memoryview(sample)).items()} == {"jpg": bytes(n), "cls": b"1"}
    assert not cut._known


def test_keys_of_any_length_take_the_short_cut():
    cut = learnt(member("k/a.x"))
    for key in ("b", "k/b", "some/what/longer", "k" * 97):
        assert matches(cut, member(f"{key}.x")), key
    for name in ("k" * 98 + ".x", "__k/a.x", "k/__a.x", "k/a.b.x", "k/.x", ".x", "k/a.y", "k/é.x"):
        assert not matches(cut, member(name)), name


@pytest.mark.parametrize("mode", [b"0000644\0", bytes(8)])
def test_a_name_that_fills_its_field_is_read_like_any_other(mode):
    """With nothing behind it its end is known by the field alone: nothing is learnt of it."""
    block = bytearray(header(b"a." + b"x" * 98, 0))
    block[100:108] = mode
    cut = Cutter()
    for _ in range(3):
        assert list(cut(memoryview(bytes(block)))) == ["x" * 98]
    assert not cut._known


def test_a_name_in_two_parts_takes_no_short_cut():
    """POSIX's prefix may make a member of no sample out of one whose name alone would be one's."""
    usual, hidden = member("a.x") + member("a.y"), member("a.x") + member("a.y", prefix=b"__meta__")
    cut = learnt(usual)
    assert not matches(cut, hidden)
    assert list(cut(memoryview(hidden))) == ["x"]
    gnu = member("a.x", magic=b"ustar  \0", prefix=b"12345") + member("a.y")  # there it is no part of the name
    assert matches(cut, gnu)


@pytest.mark.parametrize("size", [513, 600, 1023])
def test_a_member_that_ends_beyond_its_sample_is_damage(size):
    """What is known of plain headers does not read on."""
    for cut in (Cutter(), learnt(member("b.x", b"1" * 512))):
        with pytest.raises(Truncated):
            cut(memoryview(member("a.x", b"1" * 512))[:size])


def test_letters_of_either_case_take_the_short_cut():
    cut = learnt(member("k/a.NPY"))
    assert matches(cut, member("k/b.NPY"))
    assert matches(cut, member("k/b.npy"))
    assert list(cut(memoryview(member("k/c.Npy")))) == ["npy"]
    assert [len(layouts) for layouts in cut._known.values()] == [1]


def test_nothing_is_learnt_of_samples_with_very_many_members():
    """An expression for them would take seconds and hundreds of megabytes."""
    sample = b"".join(member(f"k.{n}") for n in range(MAX_MEMBERS + 1))
    assert not learnt(sample)._known
    assert len(learnt(sample[:-512])._known) == 1
