"""A service that dies in the middle of a farewell; real ones are in tests/apps/test_wandb_faults.py."""

import pytest

from diffusion_trainer.callbacks import wandb_curve
from diffusion_trainer.callbacks.wandb_curve import WandbCurve


class Recorder:
    """Stands for a wandb.Run."""

    def __init__(self):
        self.rows, self.ended = [], None

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.ended = exit_code


def farewell():
    raise SystemExit(-9)  # wandb's, when it learns at the end how its service has ended


@pytest.fixture
def curve(tmp_path, monkeypatch):
    """curve(runs) of a logger whose sessions are these; None is one that fails."""
    monkeypatch.setattr(wandb_curve.wandb, "teardown", farewell)
    monkeypatch.setattr(wandb_curve, "_kill_services", lambda: None)

    def begin(runs):
        def one(mode):
            if (run := runs.pop(mode)) is None:
                raise RuntimeError("no network")
            return run

        return WandbCurve(tmp_path, "online", one, 0, init_timeout_seconds=5, finish_timeout_seconds=5)

    return begin


def test_it_goes_on_offline_though_wandb_asks_to_exit(curve, capsys):
    run = Recorder()
    logger = curve({"online": None, "offline": run})
    logger.log_metrics({"loss": 1.0}, step=16)
    logger.finalize("success")
    assert run.rows == [{"images_seen": 16, "loss": 1.0}]
    assert run.ended == 0
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1
    assert "failed (RuntimeError: no network), and goes on offline" in said


def test_when_both_sessions_have_failed_nothing_is_kept_for_them(curve, capsys):
    logger = curve({"online": None, "offline": None})
    logger._thread.join(5)
    for i in range(wandb_curve.WAITING + 1):
        logger.log_metrics({"loss": 1.0}, step=16 * i)
    logger.finalize("success")
    assert logger._entries.empty()
    assert capsys.readouterr().out.count("WARNING") == 2
