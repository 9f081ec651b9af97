"""Sources mixed by weight: exactly in proportion, each in its own order, whoever reads them."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streaming.making import Row, pieces, shard_data, theorem, whole, write_set

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.data import ShardData, Source
from diffusion_trainer.streaming.loader import Layout

SIZES = {"a": (40, 20), "b": (7, 0, 9), "c": (3,)}
FIRST = {"a": 0, "b": 100, "c": 200}  # of the numbers of their samples
ORDER = {"seed": 2, "lanes": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sources whose files have the same names."""
    folder = tmp_path_factory.mktemp("sources")
    for name, counts in SIZES.items():
        write_set(folder / name, counts, "x", FIRST[name])
    return folder


def mixed(folder: Path, weights: dict[str, float | None], period: int = 10, **options) -> ShardData:
    sources = {name: w and Source(f"{folder}/{name}/*.tar", w) for name, w in weights.items()}
    return shard_data(None, sources=sources, mixing_period=period, window=5, **options)


def names(labels) -> list[str]:
    return ["abc"[n // 100] for n in np.asarray(labels).ravel().tolist()]


def test_each_period_of_the_lanes_has_each_source_exactly_in_proportion(folder):
    data = mixed(folder, {"a": 6.0, "b": 3.0, "c": 1.0})
    labels = whole(data, 40, range(12), **ORDER).labels  # a batch is a period of each of four lanes
    assert [Counter(names(step)) for step in labels] == [{"a": 24, "b": 12, "c": 4}] * 12
    assert len({tuple(names(step)) for step in labels}) == 12  # where each comes is shuffled
    for lane in range(4):
        assert Counter(names(labels[:, lane::4])) == {"a": 72, "b": 36, "c": 12}


@theorem(20)
@given(st.lists(st.floats(0.2, 5), min_size=3, max_size=3), st.integers(52, 60), st.integers(1, 8))
def test_each_period_of_the_lanes_has_any_weights_to_a_sample(folder, weights, period, periods):
    data = mixed(folder, dict(zip("abc", weights, strict=True)), period)
    for step in whole(data, 4 * period, range(periods), **ORDER).labels:
        of = Counter(names(step))
        for name, weight in zip("abc", weights, strict=True):
            assert abs(of[name] - 4 * period * weight / sum(weights)) < 1 + 1e-9


def test_within_a_source_every_sample_comes_once_before_any_comes_again(folder):
    """Up to the slots within the last period, in which lanes are not equally far."""
    labels = whole(mixed(folder, {"a": 6.0, "b": 3.0, "c": 1.0}), 40, range(30), **ORDER).labels.ravel().tolist()
    times = Counter(labels)
    for name, share in (("a", 24), ("b", 12), ("c", 4)):
        total = sum(SIZES[name])
        counts = [times[n] for n in range(FIRST[name], FIRST[name] + total)]
        assert sum(counts) == 30 * share
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("world", "micro_batches"), [(2, 1), (4, 2), (8, 1), (1, 8)])
@pytest.mark.parametrize("workers", [0, 2])
def test_layouts_restarts_and_batch_sizes_do_not_change_the_mixture(folder, world, micro_batches, workers):
    if workers and world > 2:
        pytest.skip("tests/streaming/test_batches.py has all worlds with workers")
    weights = {"a": 2.0, "b": 1.0, "c": 1.0}
    truth = whole(mixed(folder, weights), 16, range(3, 11), **ORDER).labels.ravel()
    data = mixed(folder, weights, num_workers=workers)
    first = whole(data, 16, range(3, 5), world, micro_batches, **ORDER).labels.ravel()
    then = whole(data, 32, range(3 * 16 // 32 + 1, 5), world, micro_batches, **ORDER).labels.ravel()
    assert first.tolist() == truth[:32].tolist()
    assert then.tolist() == truth[64 - 48 :][: len(then)].tolist()


def test_a_source_that_is_null_is_left_out_and_one_alone_is_just_itself(folder):
    assert set(names(whole(mixed(folder, {"a": 1.0, "b": None, "c": 1.0}), 40, range(2), **ORDER).labels)) == {"a", "c"}
    data = mixed(folder, {"a": None, "b": 0.5, "c": None})
    assert sorted(whole(data, 16, range(1), **ORDER).labels[0]) == [*range(100, 116)]
    assert data.count == 16


def test_sources_have_orders_of_their_own(folder):
    """Two sources of the same shards do not come in step."""
    sources = {name: Source(f"{folder}/a/*.tar") for name in "pq"}
    data = shard_data(None, sources=sources, mixing_period=2, window=60)
    labels = whole(data, 120, range(1), seed=1, lanes=1).labels[0]
    assert Counter(labels.tolist()) == dict.fromkeys(range(60), 2)
    assert np.mean(labels[::2] == labels[1::2]) < 0.2


def test_a_damaged_sample_is_replaced_by_one_of_its_source(tmp_path):
    for name, counts in SIZES.items():
        write_set(tmp_path / name, counts, "x", FIRST[name])
    weights = {"a": 6.0, "b": 3.0, "c": 1.0}
    before = whole(mixed(tmp_path, weights), 40, range(6), **ORDER)
    os.truncate(tmp_path / "b" / "x-002.tar", 2048)
    os.unlink(tmp_path / "a" / "x-001.tar")
    after = whole(mixed(tmp_path, weights), 40, range(6), 4, 2, **ORDER)
    assert names(after.labels) == names(before.labels)
    gone = {*range(40, 60), *range(108, 116)}
    assert gone.isdisjoint(after.labels.ravel().tolist())
    same = ~np.isin(before.labels, list(gone))
    assert (after.labels == before.labels)[same].all()
    assert {(Path(f.shard).parts[-2], f.kind) for f in after.found} == {("a", "missing_shard"), ("b", "truncated")}


def test_mistakes_are_told_before_anything_is_read(folder):
    with pytest.raises(ValueError, match="either shards, or sources"):
        shard_data(None)
    with pytest.raises(ValueError, match="either shards, or sources"):
        shard_data("x.tar", sources={"a": Source("y.tar")})
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weight must be positive"):
            Source("x.tar", weight)
    with pytest.raises(UserError, match=r"mixing_period of at least 1000"):
        pieces(mixed(folder, {"a": 999.0, "b": 1.0}), Layout(4), range(1))
    assert pieces(mixed(folder, {"a": 999.0, "b": 1.0}, 1000), Layout(4), range(1))
    with pytest.raises(UserError, match="no file matches"):
        pieces(mixed(folder, {"a": 1.0, "z": 1.0}), Layout(4), range(1))
    write_set(folder / "none", [0])
    with pytest.raises(UserError, match="source none has no samples"):
        pieces(mixed(folder, {"a": 1.0, "none": 1.0}), Layout(4), range(1))


@pytest.mark.parametrize("sources", [{}, {"a": None}])
def test_sources_that_are_none_are_refused(sources):
    with pytest.raises((ValueError, UserError), match="source"):
        _ = ShardData({"image": Row()}, sources=sources).count
