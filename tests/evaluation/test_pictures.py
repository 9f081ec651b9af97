"""A picture file is whole, or it is not taken for one."""

import pytest
import torch

from diffusion_trainer.evaluation import pictures


@pytest.fixture(params=[(1, 8), (3, 32)])
def file(request, tmp_path):
    channels, size = request.param
    images = torch.randint(0, 256, (80, channels, size, size), dtype=torch.uint8)
    path = pictures.of_evaluation(tmp_path, 16)
    pictures.save(pictures.grid(images, 10), path)
    return path


def test_pictures_are_found_in_order_and_nothing_else_is(file):
    pictures.save(
        pictures.grid(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 1), file.with_name("images-000000000002.png")
    )
    for other in ("images-best.png", "images-3.jpg", "notes-4.png"):
        file.with_name(other).touch()
    run = file.parent.parent
    assert [at for at, _ in pictures.of_evaluations(run)] == [2, 16]
    assert all(path == pictures.of_evaluation(run, at) for at, path in pictures.of_evaluations(run))


def test_what_a_power_cut_leaves_is_no_picture(file):
    """A file that is short, or whose end is zeros."""
    data = file.read_bytes()
    assert pictures.readable(file)
    for kept in range(0, len(data), max(1, len(data) // 100)):
        for rest in (b"", bytes(len(data) - kept)):
            file.write_bytes(data[:kept] + rest)
            assert not pictures.readable(file), (kept, len(rest))


def test_nor_is_one_with_a_flipped_bit(file):
    data = bytearray(file.read_bytes())
    for at in range(8, len(data), max(1, len(data) // 100)):
        data[at] ^= 4
        file.write_bytes(data)
        assert not pictures.readable(file), at
        data[at] ^= 4
