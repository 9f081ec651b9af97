"""Sample number t is a function of the counts, the seed and t: every sample once per epoch, however numbers are cut."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from streaming.making import theorem
from streaming.orders import COUNTS, EPOCHS, LANES, SEEDS, WINDOWS, lane_of, order, stream

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.mixing import Mix
from diffusion_trainer.streaming.order import Order, permutation


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_a_permutation_is_one_and_depends_on_its_key_alone(n):
    assert sorted(permutation(n, "a", 1)) == list(range(n))
    assert permutation(n, "a", 1).tolist() == permutation(n, "a", 1).tolist()
    if n > 7:
        assert permutation(n, "a", 1).tolist() != permutation(n, "a", 2).tolist()


def test_epochs_are_shuffled_evenly():
    """Each sample's place is uniform: over 400 epochs of 20 a chi-squared of 400 cells stays within five sigma."""
    counts = np.zeros((20, 20))
    for epoch in range(400):
        counts[np.arange(20), permutation(20, "even", epoch)] += 1
    chi_squared = ((counts - 20) ** 2 / 20).sum()
    degrees = 19 * 19
    assert abs(chi_squared - degrees) < 5 * np.sqrt(2 * degrees)


def every(counts) -> list[tuple]:
    return [(0, k, i) for k, count in enumerate(counts) for i in range(count)]


@theorem(150)
@given(COUNTS, SEEDS, LANES, WINDOWS, EPOCHS)
def test_every_sample_once_in_each_epoch(counts, seed, lanes, window, epoch):
    total = sum(counts)
    assume(total)
    read = stream([order(counts, seed, lanes, window)], range(epoch * total, (epoch + 1) * total))
    assert sorted(read) == every(counts)


@theorem(100)
@given(COUNTS, LANES, WINDOWS, st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 9), st.integers(1, 3))
def test_any_cut_of_the_numbers_gives_the_same_samples(counts, lanes, window, first, size, pieces, sources):
    """Pieces c, c + P, ..., and ranges, of one source and of several, asked for in any order of pieces."""
    assume(sum(counts))
    weights = [3, 1, 2][:sources]
    whole = stream(
        [order(counts, 1, lanes, window, f"{s}") for s in range(sources)], range(first, first + size), weights
    )
    fresh = [order(counts, 1, lanes, window, f"{s}") for s in range(sources)]
    for c in reversed(range(pieces)):
        assert stream(fresh, range(first + c, first + size, pieces), weights) == whole[c::pieces]
    middle = size // 2
    assert stream(fresh, range(first + middle, first + size), weights) == whole[middle:]
    assert stream(fresh, range(first + middle, first + middle + 1), weights) == whole[middle : middle + 1]


@theorem(60)
@given(st.lists(st.integers(0, 200), min_size=3, max_size=12), st.integers(1, 8), WINDOWS)
def test_a_lane_keeps_its_samples_up_to_its_cuts(counts, lanes, window):
    """A cut moves by less than `lanes` samples from epoch to epoch, so what a lane has differs by less than that at
    each of its two ends."""
    assume(sum(counts) >= lanes)
    o = order(counts, 2, lanes, window)
    for lane in range(lanes):
        epochs = [set(lane_of(o, lane, e)) for e in (0, 1, 2, 77)]
        assert max(len(a ^ b) for a in epochs for b in epochs) <= 2 * (lanes - 1)


@theorem(60)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 6), st.integers(1, 100))
def test_a_window_touches_few_shards_and_holds_what_it_shuffles(size, shards, lanes, window):
    """As many as it takes to hold it, and one more at each end; each lane the shards of its run and no others."""
    o = order([size] * shards, 3, lanes, window)
    for lane in range(lanes):
        read = lane_of(o, lane, 1)
        for at in range(0, len(read), window):
            assert len({k for k, _ in read[at : at + window]}) <= -(-window // size) + 3  # and the two cut ones
        assert len({k for k, _ in read}) <= -(-len(read) // size) + 1


def chi_squared(counts: np.ndarray) -> float:
    """In standard deviations from its mean, for a table whose rows and columns sum to the same."""
    expected, degrees = counts.mean(), (counts.shape[0] - 1) * (counts.shape[1] - 1)
    return abs(((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


def test_places_in_windows_and_turns_of_shards_are_uniform():
    inside, across = np.zeros((16, 16)), np.zeros((12, 12))
    one, many = order([16], lanes=1, window=16), order([2] * 12, lanes=1, window=2)
    for epoch in range(600):
        inside[np.arange(16), [i for _, i in lane_of(one, 0, epoch)]] += 1
        across[np.arange(12), [k for k, _ in lane_of(many, 0, epoch)][::2]] += 1
    assert chi_squared(inside) < 5
    assert chi_squared(across) < 5


def test_epochs_lanes_seeds_and_sources_are_shuffled_apart():
    base = order([64] * 4, 0, 2, 16)
    read = [i for _, i in lane_of(base, 0, 0)]
    others = [
        lane_of(base, 0, 1), lane_of(base, 1, 0), lane_of(order([64] * 4, 1, 2, 16), 0, 0),
        lane_of(order([64] * 4, 0, 2, 16, "t"), 0, 0),
    ]  # fmt: skip
    for other in others:
        assert np.mean([a == b for a, (_, b) in zip(read, other, strict=True)]) < 0.2
    windows = [tuple(i % 16 for i in read[at : at + 16]) for at in range(0, 128, 16)]
    assert len(set(windows)) == 8


def test_the_order_is_pinned():
    """A checkpoint of an older version resumes in the same order: this may never change."""
    assert permutation(8, "pinned").tolist() == [0, 4, 1, 7, 5, 2, 3, 6]
    read = stream([order([3, 0, 4, 2], 7, 2, 3)], range(9, 21))
    assert [(k, i) for _, k, i in read] == [
        (0, 2),
        (2, 2),
        (0, 1),
        (2, 1),
        (0, 0),
        (2, 0),
        (3, 0),
        (2, 3),
        (3, 1),
        (3, 0),
        (0, 0),
        (2, 1),
    ]
    mixed = stream([order([3, 2], 7, 2, 3, s) for s in "ab"], range(10**9, 10**9 + 10), [3, 1])
    assert mixed == [
        (0, 0, 2),
        (0, 1, 1),
        (1, 1, 0),
        (0, 1, 0),
        (0, 0, 0),
        (1, 0, 1),
        (0, 0, 1),
        (0, 0, 2),
        (1, 1, 1),
        (0, 1, 1),
    ]


@pytest.mark.parametrize(("lanes", "sources"), [(1, 1), (16, 3), (64, 1), (64, 3), (256, 1)])
def test_the_thousand_millionth_sample_of_a_hundred_thousand_shards_comes_at_once(lanes, sources):
    """And a batch of 256 from there on, of all lanes, under a second and 200 MB (the lists of shards not counted)."""
    counts = 9_000 + np.arange(100_000) % 2_001

    def batch():
        mix = Mix([Order(counts, 0, f"{s}", lanes, 16384) for s in range(sources)], [1] * sources, 1000)
        return mix(range(10**9, 10**9 + 256))

    begin = time.process_time()
    places = batch()
    took = time.process_time() - begin
    tracemalloc.start()
    try:
        batch()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (places.sample < counts[places.shard]).all()
    assert took < 1
    assert peak < 200e6


def test_memory_of_the_order_is_bounded_over_a_long_run():
    """Windows and runs that have been left are forgotten."""
    o = order([1000] * 50, lanes=4, window=1000)
    mix = Mix([o], [1])
    tracemalloc.start()
    try:
        for first in range(0, 600_000, 6000):
            mix(range(first, first + 600))
            if first == 60_000:
                early, _ = tracemalloc.get_traced_memory()
        late, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert late < early + 200_000


def test_what_makes_no_order_is_refused():
    with pytest.raises(UserError, match="source s has no samples"):
        order([0, 0])
    with pytest.raises(ValueError, match="lanes and window"):
        order([1], lanes=0)
    with pytest.raises(ValueError, match="lanes and window"):
        order([1], window=0)
