"""Killed a few times, on other ranks each time, a run ends as one that was left alone (killed_runs.py: ten times)."""

import pytest
from killed_runs import killed

pytestmark = pytest.mark.slow


def test_on_the_same_ranks_it_ends_bitwise_as_if_it_had_been_left_alone(folder):
    report = killed(folder, "same", strategy="zero2", ranks=[2], kills=1, seed=1)
    assert report.ledger_equal
    assert set(report.difference) == {"weight", "ema", "ema.power_05", "exp_avg", "exp_avg_sq"}
    assert all(difference == 0 for difference in report.difference.values())


def test_on_one_two_and_four_ranks_it_ends_with_the_same_samples_and_weights(folder):
    report = killed(folder, "other", strategy="zero3", ranks=[1, 2, 4], kills=2, seed=0)
    assert report.ledger_equal
    for kind in ("weight", "ema", "ema.power_05"):  # Adam divides by the root of moments: rounding decides some steps
        assert report.difference[kind] < 1e-2 * report.largest[kind]
