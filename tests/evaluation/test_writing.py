"""A file stands there whole, or what stood there before does."""

import pytest

from diffusion_trainer.evaluation.writing import whole


def test_it_appears_at_the_end_of_the_block_in_folders_that_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    with whole(path) as part:
        part.write_text("half")
        assert not path.exists()
        part.write_text("all")
    assert path.read_text() == "all"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_stood_there_outlives_a_block_that_fails_and_nothing_else_does(tmp_path, error):
    path = tmp_path / "x.json"
    path.write_text("before")

    def write() -> None:
        with whole(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
