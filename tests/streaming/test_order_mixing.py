"""Sources in proportion, and another sample in a damaged one's place: functions of the number, as the order is."""

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from streaming.making import theorem
from streaming.orders import COUNTS, LANES, WINDOWS, lane_of, order, stream

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.order import Mix, shares, turns


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


def test_slots_of_sources_are_shuffled_anew_in_every_lane_and_block():
    mix = Mix([order([9], source=s) for s in "ab"], [5, 5])
    patterns = [
        tuple(mix(range(lane + 40 * block, 40 * (block + 1), 4)).source) for lane in range(4) for block in range(4)
    ]
    assert len(set(patterns)) > 12
    first = np.array([turns([3, 5], "x", n)[0] for n in range(800)])
    counts = np.stack([(first == s).sum(0) for s in (0, 1)])
    assert np.abs(counts[0] - 300).max() < 5 * np.sqrt(800 * 3 / 8 * 5 / 8)


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
