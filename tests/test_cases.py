"""`each` runs all cases and says which of them failed."""

import inspect

import pytest
from cases import each


def test_all_of_a_product_run_and_the_first_error_names_all_that_failed(tmp_path):
    seen = []

    @each("sign", {"plus": 1, "minus": -1})
    @each(("n", "square"), {"two": (2, 4), "three": (3, 8), "four": (4, 15)})
    def is_square(folder, n, square, sign):
        seen.append((folder, n, sign))
        assert (sign * n) ** 2 == square, n

    assert list(inspect.signature(is_square).parameters) == ["folder"]  # what pytest fills in
    with pytest.raises(AssertionError, match=r"^3") as error:
        is_square(folder=tmp_path)
    assert seen == [(tmp_path, n, sign) for sign in (1, -1) for n in (2, 3, 4)]
    (note,) = error.value.__notes__
    assert note.startswith("4 of 6 cases failed")
    assert note.endswith(": plus-three, plus-four, minus-three, minus-four")


def test_cases_that_could_not_be_told_apart_and_arguments_that_are_none_are_refused():
    for objects in ({}, [], [1, 1], [1, "1"]):
        with pytest.raises(ValueError, match="no two of the same name"):
            each("n", objects)
    with pytest.raises(TypeError, match="takes no m"):
        each("m", [1])(lambda n: None)
