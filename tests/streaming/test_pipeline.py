"""data=webdataset: endless, equal batches on every rank; what cannot be read is counted, and if it is all, the end."""

import shutil
import tarfile
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.arrays import Array, Label, Text
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.pipeline import WebDatasetPipeline
from diffusion_trainer.streaming.writer import write_shard

pytestmark = pytest.mark.slow

SIZES = (1, 3, 17, 9)  # samples of the shards
TOTAL = sum(SIZES)
BLOCKS = 6  # of 512 bytes that a sample has: three members and their headers
ONE_RANK = Layout(8)
FIELDS = {"image": Array((2, 3), "float32"), "label": Label(), "caption": Text()}


def npy(value: float) -> bytes:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
    return np.lib.format.magic(1, 0) + b"\x76\0" + header.ljust(117) + b"\n" + np.full((2, 3), value, "<f4").tobytes()


def sample(i: int, **members) -> dict:
    return {"__key__": f"{i:03d}", "npy": npy(i), "cls": b"%d" % i, "txt": b"caption %d" % i, **members}


@pytest.fixture
def shards(tmp_path) -> list[str]:
    first = np.cumsum((0, *SIZES))
    for k, size in enumerate(SIZES):
        write_shard(tmp_path / f"{k}.tar", [sample(int(first[k]) + i) for i in range(size)])
        (tmp_path / f"{k}.tar.idx").unlink()  # it needs none
    return [str(tmp_path / f"{k}.tar") for k in range(len(SIZES))]


def data(shards, **options) -> WebDatasetPipeline:
    return WebDatasetPipeline(
        FIELDS, shards, **{"shuffle_buffer": 8, "retries": 2, "backoff_seconds": 0.001, **options}
    )


def batches(of: WebDatasetPipeline, steps=range(5), layout=ONE_RANK, seed: int = 0) -> list[dict]:
    return list(of.loader(layout, seed, 8, steps.start, steps.stop))


def labels(found: list[dict]) -> list[int]:
    return list(chain.from_iterable(batch["label"].tolist() for batch in found))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_gets_as_many_equal_batches_as_it_asks_for(shards, world, workers):
    drawn = []
    for rank in range(world):
        found = batches(data(shards, num_workers=workers), range(3, 8), Layout(8, world, rank))
        assert len(found) == 5
        for step, batch in enumerate(found, 3):
            assert batch["image"].shape == (8 // world, 2, 3)
            assert (batch["image"] == batch["label"][:, None, None]).all()  # whole samples
            assert batch["caption"] == [f"caption {i}" for i in batch["label"].tolist()]
            assert batch["damage"] == []
            assert batch["first"] == 8 * step + rank  # that is how the module knows a sample's place
        assert len({tuple(batch["label"].tolist()) for batch in found}) == 5  # no two workers draw the same
        drawn.append(labels(found))
    assert set(chain.from_iterable(drawn)) <= set(range(TOTAL))
    assert len({tuple(own) for own in drawn}) == world  # no two ranks draw the same


def test_micro_batches_are_equal_too(shards):
    found = batches(data(shards), range(2), Layout(8, 2, 1, micro_batches=2))
    assert [(len(b["label"]), b["first"]) for b in found] == [(2, 2), (2, 3), (2, 10), (2, 11)]


def test_all_samples_come_and_shards_are_drawn_evenly(shards):
    """A shard comes as often as another, however many samples it has: 300 draws of 30 samples each pass 4 sigma."""
    found = labels(batches(data(shards), range(300), Layout(30)))
    counts = Counter(found)
    assert set(counts) == set(range(TOTAL))
    ends = np.cumsum((0, *SIZES))
    visits = np.array([counts[int(e)] for e in ends[:-1]])
    assert abs(visits - visits.mean()).max() < 4 * np.sqrt(visits.mean())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_and_step_give_the_same_and_others_do_not(shards, workers):
    of = data(shards, num_workers=workers)
    once = labels(batches(of))
    assert labels(batches(of)) == once
    assert labels(batches(data(shards, num_workers=workers))) == once
    assert labels(batches(of, seed=1)) != once
    # A restart does not draw what was drawn before it, as a loader that starts its seed anew would.
    assert labels(batches(of, range(5, 10))) != once
    assert labels(batches(of, range(5, 10))) == labels(batches(of, range(5, 10)))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shards_and_samples_are_counted_and_skipped(shards, workers):
    cut = Path(shards[2])
    cut.write_bytes(cut.read_bytes()[: (7 * BLOCKS + 1) * 512])
    Path(shards[0]).unlink()
    write_shard(Path(shards[1]), [sample(1, cls=b"one"), sample(2), {"__key__": "3", "npy": npy(3)}])
    found = batches(data(shards, num_workers=workers), range(30))
    assert len(found) == 30
    assert all(len(b["label"]) == 8 for b in found)
    usable = {2, *range(4, 11), *range(21, 30)}
    assert set(labels(found)) == usable
    kinds = Counter((f.kind, Path(f.shard).name) for b in found for f in b["damage"])
    assert set(kinds) == {
        ("missing_shard", "0.tar"), ("truncated", "2.tar"), ("undecodable", "1.tar"), ("missing_field", "1.tar")
    }  # fmt: skip
    assert abs(kinds["undecodable", "1.tar"] - kinds["missing_field", "1.tar"]) <= 16  # both, each time but for buffers


@pytest.mark.parametrize(
    ("blocks", "whole"),
    [(7 * BLOCKS + 3.1, 7), (7 * BLOCKS + 0.5, 6), (7 * BLOCKS + 2, 7), (7 * BLOCKS, 6), (17 * BLOCKS, 16)],
    ids=["in a member", "in a header", "between members", "between samples", "before the end mark"],
)
def test_a_shard_that_is_cut_is_told_once_and_gives_the_samples_that_another_follows(shards, blocks, whole):
    """webdataset takes one that is cut between members for a whole one."""
    path = Path(shards[2])
    path.write_bytes(path.read_bytes()[: int(512 * blocks)])
    found = batches(data(shards[2:3]), range(20))
    assert set(labels(found)) == set(range(4, 4 + whole))
    told = Counter(f.kind for b in found for f in b["damage"])
    assert set(told) == {"truncated"}
    assert 160 / whole - 2 < told["truncated"] < 160 / whole + 5  # once each time that the shard's samples were had


def test_members_of_two_shards_make_no_sample(tmp_path):
    """Both have a sample x. The first one's is cut before its text; webdataset took that from the second."""
    first, second = (tmp_path / f"{name}.tar" for name in "ab")
    for path, value in ((first, 1), (second, 2)):
        write_shard(path, [sample(value, __key__="x")])
    first.write_bytes(first.read_bytes()[: 5 * 512])  # of its last member the header alone
    found = batches(data([str(first), str(second)], shuffle_buffer=1), range(10))
    assert set(labels(found)) == {2}
    assert all((b["image"] == 2).all() for b in found)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_command_runs_only_where_that_is_allowed(shards, tmp_path, allowed):
    mark = tmp_path / "it ran"
    url = f"pipe:touch '{mark}'; cat {shards[3]}"
    if allowed:
        assert set(labels(batches(data([url], allow_pipe=True)))) <= set(range(21, 30))
    else:
        for pattern in (url, [shards[0], url]):
            with pytest.raises(ValueError, match="allow_pipe=true"):
                data(pattern)
    assert mark.exists() == allowed


UNREADABLE = {
    "missing": lambda p: p.unlink(),
    "no tar": lambda p: p.write_bytes(b"<html>" * 1000),
    "empty file": lambda p: p.write_bytes(b""),
    "no samples": lambda p: tarfile.open(p, "w").close(),
    "other members": lambda p: write_shard(p, [{"__key__": "1", "bin": b"1"}]),
    "undecodable": lambda p: write_shard(p, [sample(1, cls=b"one")]),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.timeout(10)
def test_where_nothing_can_be_read_it_stops_and_says_so(shards, what, workers):
    for shard in shards:
        UNREADABLE[what](Path(shard))
    found = batches(data(shards, num_workers=workers), range(2))
    assert "error" in found[0]
    assert any(words in found[0]["error"] for words in ("failures", "no samples", "neither"))
    assert found[0]["passing"] == (what == "missing")  # all at once: a file system that is not there


@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.timeout(10)
def test_the_first_samples_are_refused_likewise(shards, what):
    """They are what a run looks at before it starts."""
    first = data(shards).first(4)
    assert first["image"].shape == (4, 2, 3)
    assert torch.equal(data(shards).first(4)["label"], first["label"])
    for shard in shards:
        UNREADABLE[what](Path(shard))
    with pytest.raises(UserError) as refused:
        data(shards).first(4)
    assert not isinstance(refused.value, PassingError)


def test_braces_and_lists_name_shards(shards, tmp_path):
    assert data(f"{tmp_path}/{{0..3}}.tar").urls == shards
    assert data([f"{tmp_path}/{{0..1}}.tar", shards[3]]).urls == [shards[0], shards[1], shards[3]]


@pytest.mark.parametrize(
    ("options", "say"),
    [
        ({"shuffle_buffer": 0}, "must be positive"),
        ({"prefetch": 0}, "must be positive"),
        ({"num_workers": -1}, "not negative"),
        ({"damage_budget": 1.0}, "damage_budget"),
    ],
)
def test_what_cannot_be_is_refused(shards, options, say):
    with pytest.raises(ValueError, match=say):
        data(shards, **options)


@pytest.mark.parametrize(
    ("names", "say"),
    [
        ("{}/*.tar", "use braces"),
        ("file://{}/*.tar", "use braces"),
        ([], "names none"),
        ("", "names none"),
        (["{}/0.tar", "{}"], r"is a folder; name its files: .*/x-\{000\.\.099\}\.tar"),
    ],
)
def test_what_a_hurried_user_names_is_refused_with_what_would_be_right(shards, tmp_path, names, say):
    there = names.format(tmp_path) if isinstance(names, str) else [name.format(tmp_path) for name in names]
    with pytest.raises(ValueError, match=say):
        data(there)


def test_nothing_lasting_is_claimed(shards):
    assert data(shards).fingerprint is None
    assert data(shards).count is None


def test_a_copy_elsewhere_gives_the_same(shards, tmp_path):
    """The draws depend on which shard of the list it is, not on where it lies."""
    for shard in shards:
        shutil.copytree(Path(shard).parent, tmp_path / "copy", dirs_exist_ok=True, ignore=lambda *_: ["copy"])
    copies = [str(tmp_path / "copy" / Path(shard).name) for shard in shards]
    assert labels(batches(data(copies))) == labels(batches(data(shards)))
