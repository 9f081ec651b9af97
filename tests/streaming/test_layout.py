"""How global batches are cut into pieces."""

import pytest

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.loader import Layout


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
