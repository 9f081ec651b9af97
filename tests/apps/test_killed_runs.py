"""Killed again and again, on other ranks each time, a run ends as one left alone (killed_runs.py: ten times)."""

import pytest
from killed_runs import killed

pytestmark = pytest.mark.slow
KINDS = {"weight", "ema", "ema.power_05", "exp_avg", "exp_avg_sq"}


def test_on_the_same_ranks_it_ends_bitwise_as_if_it_had_been_left_alone(folder):
    report = killed(folder, "same", strategy="zero3", ranks=[2], kills=3, seed=1)
    assert report.ledger_equal
    assert report.difference == dict.fromkeys(KINDS, 0.0)


def test_on_one_two_and_four_ranks_it_ends_with_the_same_samples_and_to_summation_order_with_the_same_numbers(folder):
    """Each change of ranks twice. Runs that were left alone differ so little that nothing could hide in that."""
    report = killed(folder, "other", strategy="zero3", ranks=[1, 2, 4], kills=6, seed=0)
    assert report.same(), report
    assert report.allowed.keys() == KINDS
    for kind in KINDS:
        assert 0 < report.allowed[kind] < 0.01 * report.largest[kind]
