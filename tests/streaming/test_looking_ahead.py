"""A batch knows of an error behind it."""

import pytest

from diffusion_trainer.streaming.looking_ahead import ERROR_AHEAD, LookingAhead

ERROR = {"error": "the store does not answer", "passing": True, "damage": []}


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("good", range(6))
def test_so_many_before_an_error_know_of_it_and_none_is_lost(ahead, good):
    batches = [{"first": i} for i in range(good)]
    found = list(LookingAhead([*batches, ERROR], ahead))
    known = [{"first": i, **({ERROR_AHEAD: ERROR} if i >= good - ahead else {})} for i in range(good)]
    assert found == [*known, ERROR]
    assert list(LookingAhead([{"first": i} for i in range(good)], ahead)) == [{"first": i} for i in range(good)]


@pytest.mark.parametrize("ahead", [1, 2])
def test_no_more_are_fetched_than_that(ahead):
    fetched = []
    batches = iter(LookingAhead((fetched.append(i) or {"first": i} for i in range(9)), ahead))
    for i in range(5):
        assert next(batches) == {"first": i}
        assert len(fetched) == i + 1 + ahead


def test_it_is_as_long_as_the_loader():
    assert len(LookingAhead([1, 2, 3], 2)) == 3
