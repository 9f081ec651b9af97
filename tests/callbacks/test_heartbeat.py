"""What is a sign of life, what is said with it, and how long the next may take."""

import pytest
import torch

from diffusion_trainer.callbacks.heartbeat import Heartbeat
from diffusion_trainer.callbacks.watchdog import Watchdog


@pytest.mark.parametrize("seconds", [(0, 10), (-1, 10), (10, 9), (10, float("inf")), (float("nan"), 10)])
def test_time_outs_that_make_no_sense_are_refused(seconds):
    with pytest.raises(ValueError, match="must be positive and at most start_timeout_seconds"):
        Heartbeat(*seconds)


class Module(torch.nn.Module):
    """What a Heartbeat knows of a DiffusionModule and a Trainer."""

    def __init__(self, folder):
        super().__init__()
        self.model, self.images_seen, self.progress = torch.nn.Linear(1, 1), 32, type("P", (), {"batch_size": 16})
        self.default_root_dir, self.global_rank, self.world_size, self.accumulate_grad_batches = folder, 0, 1, 2


@pytest.fixture
def beats(tmp_path, monkeypatch):
    """A heartbeat that stands in its callback's place; what it tells its watchdog."""
    heartbeat, module, told = Heartbeat(10, 20), Module(tmp_path), []
    beat = Watchdog.beat
    monkeypatch.setattr(Watchdog, "beat", lambda *args: beat(*args) or told.append(args[1:]))
    heartbeat.setup(module, module, "fit")
    yield heartbeat, module, told
    heartbeat.teardown(module, module, "fit")
    heartbeat.on_exception(module, module, RuntimeError())  # after it, or before `setup`: of no effect
    assert not module.model._forward_pre_hooks


def test_each_call_of_the_model_is_a_beat_and_says_what_for(beats):
    _, module, told = beats
    module.model(torch.ones(1, 1))
    module.eval()
    module.model(torch.ones(1, 1))
    assert told == [("the start", 20), ("a training step", 20), ("an evaluation", 20)]


def test_the_time_for_the_start_is_over_with_the_first_step(beats):
    heartbeat, module, told = beats
    heartbeat.on_train_batch_end(module, module, None, None, 0)  # the first of two micro-batches
    heartbeat.on_train_batch_end(module, module, None, None, 1)
    heartbeat.on_train_batch_start(module, module, None, 2)
    assert told[1:] == [("waiting for data", 20), ("waiting for data", 10), ("a training step", 10)]


def test_the_first_batch_is_waited_for_no_longer_than_any_other(beats):
    heartbeat, module, told = beats
    heartbeat.run = type("Run", (), {})()
    heartbeat.start()
    heartbeat.on_train_batch_start(module, module, None, 0)
    assert told[1:] == [("waiting for data", 10), ("a training step", 20)]


def test_a_callback_may_ask_for_more_time_but_not_for_less(beats):
    heartbeat, module, told = beats
    heartbeat.run = type("Run", (), {})()
    heartbeat.start()
    heartbeat.on_train_batch_end(module, module, None, None, 1)
    heartbeat.run.beat("the wait for a checkpoint", 3600)
    heartbeat.run.beat("what follows a step", 1)
    assert told[3:] == [("the wait for a checkpoint", 3600), ("what follows a step", 10)]


def test_after_the_last_step_no_data_is_waited_for(beats):
    """Before any callback's on_train_end, where ranks may wait for each other; and behind the last of them."""
    heartbeat, module, told = beats
    heartbeat.on_train_batch_end(module, module, None, None, 1)
    heartbeat.on_train_epoch_end(module, module)
    assert told[-1] == ("the end", 20)
    heartbeat._of_the_model(module.model, ())
    heartbeat.on_train_end(module, module)
    assert told[-2:] == [("a training step", 10), ("the end", 20)]
