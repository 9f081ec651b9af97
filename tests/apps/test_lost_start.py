"""All ranks of a start, where an earlier one of its job still trains on a node that SLURM has lost."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import tiny

from diffusion_trainer.apps import folder_lock, rank, train
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.conventions import PassingError

SIZE = 2


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Those of start 1 of job 77, each in a thread of its own. did[n]: "wait" and "work", as rank n did them."""
    run, did, this = tmp_path / "run", [[] for _ in range(SIZE)], threading.local()
    config = load("train", [*tiny.overrides(tmp_path), f"folder={run}", "strategy=ddp"], TrainConfig)

    def wait(seconds: float) -> None:
        did[this.rank].append("wait")
        time.sleep(0.01)

    def work(config, folder, world) -> int:
        did[world.rank].append("work")
        return 1

    def start(number: int) -> int:
        this.rank = number
        return train._run(config, run, World(number, SIZE, 1, False))

    now = SimpleNamespace(monotonic=time.monotonic, strftime=time.strftime, sleep=wait)
    monkeypatch.setattr(folder_lock, "time", now)
    monkeypatch.setattr(rank, "work", work)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    return SimpleNamespace(run=run, did=did, start=start)


def test_no_rank_looks_where_the_run_is_before_the_lost_start_has_ended(ranks, monkeypatch):
    with ThreadPoolExecutor(SIZE) as pool:
        with monkeypatch.context() as lost:
            lost.setenv("SLURM_RESTART_COUNT", "0")
            held = folder_lock.held(ranks.run)
            held.__enter__()
        try:
            starts = [pool.submit(ranks.start, number) for number in range(SIZE)]
            while not all(ranks.did) and not any(start.done() for start in starts):
                time.sleep(0.01)
            early = [doing[-1] for doing in ranks.did if doing]
        finally:
            held.__exit__(None, None, None)
        assert [start.result() for start in starts] == [1] * SIZE
    assert early == ["wait"] * SIZE
    assert all(doing.index("work") == len(doing) - 1 for doing in ranks.did)


@pytest.mark.parametrize("last", ["", "77.1", "78.0", "torn"])
def test_where_no_earlier_start_had_the_folder_no_rank_waits(ranks, last):
    ranks.run.mkdir()
    (ranks.run / ".lock").write_text(last)
    assert ranks.start(1) == 1
    assert ranks.did[1] == ["work"]


def test_a_rank_does_not_wait_for_ever_for_rank_0(ranks, monkeypatch):
    ranks.run.mkdir()
    (ranks.run / ".lock").write_text("77.0")
    monkeypatch.setattr(folder_lock, "LOST_SECONDS", 0)
    with pytest.raises(PassingError, match="rank 0 has not begun within 0 s"):
        ranks.start(1)
    assert "work" not in ranks.did[1]
