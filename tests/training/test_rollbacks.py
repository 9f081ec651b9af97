"""What a run has left out is the same on all ranks."""

from multiprocessing import Pipe
from threading import Thread

from saved import Piped

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
