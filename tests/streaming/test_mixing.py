"""Sample number t is a function of the counts, the seed and t: every sample once per epoch, however numbers are cut."""

import time
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from streaming.making import theorem

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.order import Mix, Order, permutation, shares, turns

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=40)
SEEDS = st.integers(0, 2**32)
LANES = st.integers(1, 16)
WINDOWS = st.integers(1, 70)
EPOCHS = st.sampled_from([0, 1, 2, 1000, 10**9])


def order(counts, seed=0, lanes=4, window=8, source="s") -> Order:
    return Order(np.array(counts), seed, source, lanes, window)


def stream(orders: list[Order], numbers: range, shares=(1,)) -> list[tuple]:
    """(source, shard, sample) of each number."""
    places = Mix(orders, shares)(numbers)
    return list(zip(*(p.tolist() for p in places), strict=True))


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
@given(st.lists(COUNTS, min_size=2, max_size=4), LANES, WINDOWS, st.integers(4, 30), st.integers(0, 20), st.data())
def test_sources_come_exactly_in_proportion_and_each_sample_of_them_equally_often(
    counts, lanes, window, period, block, data
):
    assume(all(map(sum, counts)))
    parts = data.draw(st.lists(st.integers(1, 9), min_size=len(counts), max_size=len(counts)))
    assume(min(parts) / sum(parts) * period >= 1)
    share, span = shares(parts, period), lanes * period
    orders = [order(c, 5, lanes, window, f"{s}") for s, c in enumerate(counts)]
    aligned = stream(orders, range(block * span, (block + 1) * span), share)
    assert Counter(s for s, _, _ in aligned) == {s: lanes * n for s, n in enumerate(share)}
    for lane in range(lanes):
        assert Counter(s for s, _, _ in aligned[lane::lanes]) == dict(enumerate(share))
    times = Counter(stream(orders, range(5 * span), share))
    for s, c in enumerate(counts):  # five periods begin at an epoch: all samples q or q + 1 times, as the sizes demand
        q, more = divmod(5 * lanes * share[s], sum(c))
        often = [times[s, k, i] for k, n in enumerate(c) for i in range(n)]
        assert Counter(often) == Counter({q: sum(c) - more, q + 1: more} if more else {q: sum(c)})


def lane_of(o: Order, lane: int, epoch: int) -> list[tuple]:
    """All that a lane reads in an epoch, in order."""
    first = epoch * o.total
    first += (lane - first) % o.lanes
    return [(k, i) for _, k, i in stream([o], range(first, (epoch + 1) * o.total, o.lanes))]


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


def test_slots_of_sources_are_shuffled_anew_in_every_lane_and_block():
    mix = Mix([order([9], source=s) for s in "ab"], [5, 5])
    patterns = [
        tuple(mix(range(lane + 40 * block, 40 * (block + 1), 4)).source) for lane in range(4) for block in range(4)
    ]
    assert len(set(patterns)) > 12
    first = np.array([turns([3, 5], "x", n)[0] for n in range(800)])
    counts = np.stack([(first == s).sum(0) for s in (0, 1)])
    assert np.abs(counts[0] - 300).max() < 5 * np.sqrt(800 * 3 / 8 * 5 / 8)


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
        mix = Mix([Order(counts, 0, f"{s}", lanes, 16384) for s in range(sources)], shares([1] * sources, 1000))
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


@theorem(100)
@given(st.lists(COUNTS, min_size=1, max_size=3), LANES, WINDOWS, st.integers(0, 10**6), st.integers(0, 5))
def test_another_sample_is_of_the_same_source_and_lane(counts, lanes, window, number, attempt):
    assume(all(sum(c) > lanes for c in counts))
    orders = [order(c, 5, lanes, window, f"{s}") for s, c in enumerate(counts)]
    mix = Mix(orders, [1] * len(counts))
    source, shard, sample = mix.instead(number, attempt)
    assert (source, shard, sample) == Mix(orders, [1] * len(counts)).instead(number, attempt)
    ((own, *_),) = stream(orders, range(number, number + 1), [1] * len(counts))
    assert source == own
    element = int(mix._numbers(number % lanes, np.array([number]))[1][0])
    epoch = element // orders[own].total
    near = {place for e in range(epoch, epoch + 3 + lanes) for place in lane_of(orders[own], number % lanes, e)}
    assert (shard, sample) in near


@theorem(100)
@given(COUNTS, LANES, WINDOWS, st.integers(0, 10**4))
def test_another_sample_is_another_one(counts, lanes, window, number):
    """Of a lane that has more than one; soon at least, and never the same one again and again."""
    assume(sum(counts) >= 2 * lanes)
    o = order(counts, 5, lanes, window)
    (own,) = stream([o], range(number, number + 1))
    first = [Mix([o], [1]).instead(number, attempt) for attempt in range(8)]
    assert len({*first, own}) > 1
    assert first[0] != own


def test_a_replacement_is_found_where_a_whole_shard_is_gone():
    """Shards are larger than windows: a replacement from the same window would be as gone."""
    mix = Mix([order([500] * 8, lanes=2, window=16)], [1])
    read = stream(mix.orders, range(4000))
    gone = read[1000][1]
    for number in [n for n, (_, k, _) in enumerate(read) if k == gone][::25]:
        assert any(mix.instead(number, attempt)[1] != gone for attempt in range(64))


@theorem(200)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(1, 2000))
def test_shares_sum_to_the_period_and_are_within_one_of_the_weights(weights, period):
    exact = np.array(weights) / sum(weights) * period
    try:
        found = np.array(shares(weights, period))
    except UserError as error:
        assert exact.min() < 1
        enough = int(str(error).rsplit(" ", 1)[1])
        assert min(shares(weights, enough)) >= 1
        return
    assert found.sum() == period
    assert (np.abs(found - exact) < 1 + 1e-9).all()
    assert found.min() >= 1


def test_turns_count_each_ones_slots():
    who, rank = turns([2, 0, 3], "x")
    assert [sorted(rank[who == s]) for s in range(3)] == [[0, 1], [], [0, 1, 2]]
    assert all(a < b for s in (0, 2) for a, b in pairwise(rank[who == s]))


def test_what_makes_no_order_is_refused():
    with pytest.raises(UserError, match="source s has no samples"):
        order([0, 0])
    with pytest.raises(ValueError, match="lanes and window"):
        order([1], lanes=0)
    with pytest.raises(ValueError, match="lanes and window"):
        order([1], window=0)
