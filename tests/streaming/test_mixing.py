"""Sources in proportion, and another sample in a damaged one's place: functions of the number, as the order is."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor, log

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from streaming.making import theorem
from streaming.orders import COUNTS, LANES, WINDOWS, lane_of, order, stream

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.mixing import Mix, counts, floor_sum, in_proportion, turns, turns_of


@theorem(60)
@given(st.lists(COUNTS, min_size=2, max_size=4), LANES, WINDOWS, st.integers(0, 20), st.data())
def test_sources_come_exactly_in_proportion_and_each_sample_of_them_equally_often(counts, lanes, window, block, data):
    assume(all(map(sum, counts)))
    share = data.draw(st.lists(st.integers(1, 9), min_size=len(counts), max_size=len(counts)))
    span = lanes * sum(share)
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


WEIGHTS = st.lists(st.one_of(st.floats(0.01, 100), st.integers(1, 100)), min_size=2, max_size=6)


@theorem(200)
@given(WEIGHTS, st.integers(1, 2000))
def test_parts_are_in_the_very_proportion_of_the_weights_as_they_are_written(weights, period):
    exact = [Fraction(str(weight)) for weight in weights]
    try:
        found = in_proportion(weights, period)
    except UserError as error:
        assert min(exact) / sum(exact) * period < 1
        enough = int(str(error).rsplit(" ", 1)[1])
        assert in_proportion(weights, enough)
        with pytest.raises(UserError):
            in_proportion(weights, enough - 1)
        return
    assert [Fraction(part, sum(found)) for part in found] == [weight / sum(exact) for weight in exact]


@theorem(200)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 90), st.integers(0, 90))
def test_points_below_a_line_are_counted(n, m, a, b):
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


PARTS = st.lists(
    st.one_of(st.integers(0, 50), st.integers(1, 10**6), st.integers(1, 10**40)), min_size=1, max_size=6
).filter(any)
STARTS = st.fractions(0, 1).filter(lambda start: start < 1)


@theorem(200)
@given(st.one_of(st.integers(0, 100), st.integers(0, 10**12)), st.integers(1, 1000), PARTS, STARTS)
def test_each_period_has_each_ones_part_rounded_down_or_up_and_it_evens_out(n, period, parts, start):
    before, after = counts(n, period, parts, start), counts(n + 1, period, parts, start)
    assert sum(before) == n * period
    for one, two, part in zip(before, after, parts, strict=True):
        exact = Fraction(period * part, sum(parts))
        assert two - one in (floor(exact), ceil(exact))
        assert abs(one - n * exact) < 3 + log(n + 1) / 2


@theorem(100)
@given(st.integers(0, 10**12), st.integers(1, 200), PARTS, STARTS)
def test_the_turns_of_a_period_are_those_by_which_the_counts_go_on(block, period, parts, start):
    who, rank = turns_of(block, period, parts, "x", start=start)
    before, after = counts(block, period, parts, start), counts(block + 1, period, parts, start)
    for one in range(len(parts)):
        assert sorted(rank[who == one]) == list(range(before[one], after[one]))


@theorem(100)
@given(st.integers(0, 10**9), st.integers(1, 64), st.integers(1, 1000), PARTS)
def test_all_lanes_together_have_each_ones_part_of_a_period_to_one(block, lanes, period, parts):
    starts = [Fraction(lane, lanes) for lane in range(lanes)]
    mine = sum(np.subtract(*(counts(n, period, parts, start) for n in (block + 1, block))) for start in starts)
    for found, part in zip(mine, parts, strict=True):
        assert abs(int(found) - Fraction(lanes * period * part, sum(parts))) <= 1


def test_parts_of_any_size_come_out_exactly():
    parts = [10**40 + 1, 10**40]
    assert counts(sum(parts) << 80, 3, parts) == [3 * part << 80 for part in parts]


def test_a_weight_that_is_no_whole_number_of_a_period_is_kept():
    """0.0015 of 1,000 would be 1 if it were rounded, two thirds of it."""
    mix = Mix([order([50] * 4, lanes=4, source=s) for s in "ab"], in_proportion([0.9985, 0.0015], 1000), 1000)
    assert Counter(mix(range(4 * 20_000)).source.tolist()) == {0: 79_880, 1: 120}


def test_turns_count_each_ones_slots():
    who, rank = turns([2, 0, 3], "x")
    assert [sorted(rank[who == s]) for s in range(3)] == [[0, 1], [], [0, 1, 2]]
    assert all(a < b for s in (0, 2) for a, b in pairwise(rank[who == s]))
