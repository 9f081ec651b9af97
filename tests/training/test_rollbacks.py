"""What a run has left out is the same on all ranks."""

from multiprocessing import Pipe
from threading import Thread

import pytest
from saved import Piped

from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.rollbacks import Rollbacks, left_out


def test_all_ranks_leave_out_what_rank_0_knows_of(tmp_path):
    """The others may be on a node whose file system lags."""
    Rollbacks(tmp_path).add(64, 384, "a")
    lagging = tmp_path / "lagging"
    lagging.mkdir()
    found = {}

    def ask(rank, end, folder):
        found[rank] = left_out(folder, 128, Piped(rank, end))

    threads = [
        Thread(target=ask, args=(r, e, f)) for r, (e, f) in enumerate(zip(Pipe(), (tmp_path, lagging), strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 320, 1: 320}


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', '[{"images_seen": 5', '[{"a": 1}]', "[1]", "7", "{}"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "rollbacks.json").write_text(text)
    with pytest.raises(UserError, match=r"rollbacks\.json is damaged: it says which data"):
        Rollbacks(tmp_path)


def test_numbers_of_images_are_numbers(tmp_path):
    entry = '[{"images_seen": %s, "left_out": 1, "reason": "a"}]'
    (tmp_path / "rollbacks.json").write_text(entry % '"5"')
    with pytest.raises(UserError, match="is damaged"):
        Rollbacks(tmp_path)
    (tmp_path / "rollbacks.json").write_text(entry % 5)
    assert Rollbacks(tmp_path).left_out(5) == 1
