"""Great circles between noises."""

import pytest
import torch
from torch.testing import assert_close

from diffusion_trainer.evaluation.modes import slerp


def test_slerp_of_unit_vectors_is_of_unit_length_and_turns_evenly():
    a, b = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = a / a.norm(), b / b.norm()
    share = torch.linspace(0, 1, 9, dtype=torch.float64)
    path = slerp(a, b, share)
    assert path.shape == (9, 3, 4, 5)
    assert_close(path.flatten(1).norm(dim=1), torch.ones(9, dtype=torch.float64))
    assert_close(path[0], a)
    assert_close(path[-1], b)
    angles = (path[1:] * path[:-1]).flatten(1).sum(1).acos()
    assert_close(angles, angles.mean().expand(8), rtol=1e-6, atol=0)
    assert_close(angles.sum(), (a * b).sum().acos(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1.0, 2.0, 1 + 1e-4])
def test_slerp_of_parallel_vectors_is_the_line_between_them(dtype, factor):
    a = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    share = torch.linspace(0, 1, 5, dtype=dtype)
    path = slerp(a, factor * a, share)
    assert path.isfinite().all()
    assert_close(path, torch.lerp(a[None], factor * a[None], share[:, None, None, None]), rtol=1e-3, atol=1e-3)


def test_slerp_of_opposite_vectors_keeps_its_ends():
    a = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = slerp(a, -a, torch.linspace(0, 1, 3, dtype=torch.float64))
    assert path.isfinite().all()
    assert_close(path[[0, 2]], torch.stack([a, -a]))


def test_slerp_of_independent_noise_keeps_its_size():
    """Which is why it is not a line: half way on a line the noise has 0.7 of its standard deviation."""
    a, b = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert slerp(a, b, torch.tensor([0.5])).std().item() == pytest.approx(1, abs=0.02)
