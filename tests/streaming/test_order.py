"""Which sample comes when."""

import numpy as np
import pytest

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.order import permutation


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_a_permutation_is_one_and_depends_on_its_key_alone(n):
    assert sorted(permutation(n, "a", 1)) == list(range(n))
    assert permutation(n, "a", 1).tolist() == permutation(n, "a", 1).tolist()
    if n > 7:
        assert permutation(n, "a", 1).tolist() != permutation(n, "a", 2).tolist()


def test_the_order_is_pinned():
    """A checkpoint of an older version resumes in the same order: this may never change."""
    assert permutation(8, "pinned").tolist() == [0, 4, 1, 7, 5, 2, 3, 6]


def test_epochs_are_shuffled_evenly():
    """Each sample's place is uniform: over 400 epochs of 20 a chi-squared of 400 cells stays within five sigma."""
    counts = np.zeros((20, 20))
    for epoch in range(400):
        counts[np.arange(20), permutation(20, "even", epoch)] += 1
    chi_squared = ((counts - 20) ** 2 / 20).sum()
    degrees = 19 * 19
    assert abs(chi_squared - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_any_layout_cuts_the_same_global_batches(world, micro_batches):
    layouts = [Layout(32, world, rank, micro_batches) for rank in range(world)]
    for step in (0, 5):
        numbers = sorted(
            n for layout in layouts for m in range(micro_batches) for n in layout.numbers(step * micro_batches + m)
        )
        assert numbers == list(range(32 * step, 32 * (step + 1)))


def test_a_batch_that_does_not_divide_is_refused_with_what_would():
    with pytest.raises(UserError, match="multiple of 6"):
        Layout(32, world=3, rank=0, micro_batches=2)
