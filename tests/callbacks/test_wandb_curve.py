"""Sessions that fail or never begin, and what of one the next one tells; tests/apps/test_wandb_*.py have real runs."""

from contextlib import ExitStack
from queue import Full, Queue
from threading import Event, Thread

import pytest
from PIL.Image import new

from diffusion_trainer.callbacks import wandb_curve, wandb_session
from diffusion_trainer.callbacks.wandb_curve import WandbCurve
from diffusion_trainer.callbacks.wandb_session import alone
from diffusion_trainer.conventions import PassingError


class Recorder:
    """Stands for a wandb.Run."""

    starting_step = 0

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

    def begin(runs, init_timeout_seconds=5):
        def one(mode):
            if (run := runs.pop(mode)) is None:
                raise RuntimeError("no network")
            return run

        return WandbCurve(tmp_path, "online", one, 0, init_timeout_seconds, finish_timeout_seconds=5)

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


@pytest.mark.parametrize("ends", [True, False])
def test_a_start_waits_for_wandb_sync_as_long_as_for_a_server(tmp_path, curve, capsys, monkeypatch, ends):
    """Two sessions at once would write over each other's rows."""
    runs = {"online": Recorder(), "offline": Recorder()}
    with ExitStack() as sync:
        sync.enter_context(alone(tmp_path, 0))
        with pytest.raises(PassingError, match="another process is sending"), alone(tmp_path, 0):
            pass
        if ends:
            monkeypatch.setattr(wandb_session.time, "sleep", lambda seconds: sync.close())
        logger = curve(dict(runs), init_timeout_seconds=60 if ends else 0.2)
        logger.log_metrics({"loss": 1.0}, step=16)
        logger.finalize("success")
    assert {mode: len(run.rows) for mode, run in runs.items()} == {"online": int(ends), "offline": int(not ends)}
    assert ("another process is sending" in capsys.readouterr().out) is not ends


def test_when_both_sessions_have_failed_nothing_is_kept_for_them(curve, capsys):
    logger = curve({"online": None, "offline": None})
    logger._thread.join(5)
    for i in range(wandb_curve.WAITING + 1):
        logger.log_metrics({"loss": 1.0}, step=16 * i)
    logger.finalize("success")
    assert logger._entries.empty()
    assert capsys.readouterr().out.count("WARNING") == 2


@pytest.fixture
def waits(monkeypatch) -> list:
    """How long the main thread would wait, each time; it does not."""
    waits = []

    class Begun(Event):
        def wait(self, timeout=None):
            waits.append(timeout)

    class Worker(Thread):
        def join(self, timeout=None):
            waits.append(timeout)

    class Entries(Queue):
        def put(self, item, block=True, timeout=None):
            if block and self.full():
                waits.append(timeout)
                raise Full
            super().put(item, block, timeout)

    for name, watched in (("Event", Begun), ("Thread", Worker), ("Queue", Entries)):
        monkeypatch.setattr(wandb_curve, name, watched)
    monkeypatch.setattr(wandb_curve, "_kill_services", lambda: None)
    return waits


@pytest.mark.parametrize(("status", "seconds"), [("success", 60), ("failed", wandb_curve.FAILED_SECONDS)])
def test_training_waits_at_the_start_and_at_the_end_and_never_between(tmp_path, waits, status, seconds):
    """For a session that never begins, with more to tell than is kept for it."""
    never = Event()
    logger = WandbCurve(tmp_path, "online", lambda mode: never.wait() and 1 / 0, 0, 30, 60)
    assert waits == [30 + wandb_curve.KILLED_SECONDS]
    for i in range(wandb_curve.WAITING + 10):
        logger.log_metrics({"loss": 1.0}, step=16 * i)
    logger.log_picture("samples", new("L", (8, 8)), 16)
    logger.alert("title", "text")
    assert len(waits) == 1
    logger.finalize(status)
    assert waits[1:] == [seconds, wandb_curve.KILLED_SECONDS]
    never.set()
