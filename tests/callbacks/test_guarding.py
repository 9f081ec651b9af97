"""When the guard counts, when it goes back and how far, and when it lets be."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusion_trainer.callbacks.guarding import KEY, Guarding
from diffusion_trainer.callbacks.run import Run
from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoints import save
from diffusion_trainer.training.rollbacks import Rollbacks
from diffusion_trainer.training.saving import folders
from diffusion_trainer.training.sharding import Replicated

BATCH = 32
MODEL = torch.nn.Linear(2, 2)
SHARDING = Replicated(MODEL, torch.optim.SGD(MODEL.parameters()))
NAN = float("nan")


class FakeRun(SimpleNamespace):
    """A run of one rank whose losses come from the test."""

    def __init__(self, folder, state, seen):
        module = SimpleNamespace(
            last_terms=None,
            nonfinite=SimpleNamespace(kept=1.0),
            loss_scale=None,
            progress=SimpleNamespace(batch_size=BATCH),
            images_seen=seen,
        )
        super().__init__(
            folder=folder,
            module=module,
            agreement=Agreement(),
            trainer=SimpleNamespace(accumulate_grad_batches=1, should_stop=False, callbacks=[]),
            _answers=(-1, {}),
            state=state or {},
            first=True,
            stopping=False,
            rolled_back=False,
            logged=[],
            alerts=[],
            beats=[],
        )

    @property
    def images_seen(self):
        return self.module.images_seen

    def settle(self):
        return None

    def beat(self, doing, allowed_seconds=0.0):
        self.beats.append((doing, allowed_seconds))

    answer = Run.answer

    def log(self, metrics, images_seen=None):
        self.logged.append((self.images_seen if images_seen is None else images_seen, metrics))

    def alert(self, title, text):
        self.alerts.append((title, text))


def guarded(folder, guard, losses, checkpoints=(), state=None, seen=0):
    """The run after these losses, of which NaN is a step that was not taken, or until it goes back."""
    for images in checkpoints:
        save(folder / "checkpoints", images, SHARDING, {}, Agreement(), 100)
    run = guard.run = FakeRun(folder, state, seen)
    run.trainer.callbacks.append(guard)
    guard.start()
    for i, loss in enumerate(losses):
        run.module.nonfinite.kept = torch.tensor(float(np.isfinite(loss)))
        run.module.last_terms = SimpleNamespace(loss=torch.full((4,), float(loss)))
        run.module.images_seen += BATCH
        guard.on_train_batch_end(run.trainer, run.module, None, {}, i)
        if run.stopping:
            break
    guard.before_save()
    guard.on_train_end(run.trainer, run.module)
    return run


def test_single_steps_that_were_not_taken_are_counted_and_told(tmp_path):
    run = guarded(tmp_path, Guarding(skipped_in_a_row=3), [1, NAN, 1, NAN, NAN, 1])
    assert [metrics for _, metrics in run.logged] == [{"train/skipped_steps": n} for n in (1, 2, 3)]
    assert len(run.alerts) == 3
    assert "at 32 images" in run.alerts[0][1]
    assert not run.stopping
    assert run.state[KEY] == {"losses": [1, 1, 1], "skipped": 3, "in_a_row": 0}


@pytest.mark.parametrize(("loss", "alerts"), [(1.0, 0), (NAN, 1), (float("inf"), 1)])
def test_a_loss_scale_is_to_blame_for_gradients_alone(tmp_path, loss, alerts):
    """It multiplies the loss that there is: one that is not finite was so before."""
    guard = Guarding()
    run = guarded(tmp_path, guard, [1, 1])
    guard._judge(run.images_seen, (loss, 0.0, 1.0))
    assert len(run.alerts) == alerts
    assert run.logged[-1][1] == {"train/skipped_steps": 1}


def test_so_many_in_a_row_lead_back_to_the_newest_checkpoint_and_leave_out_what_was_read_since(tmp_path):
    """No weight has changed in the row, so one made in it will do. It is noticed a step late, one more on its way."""
    checkpoints = [2 * BATCH, 6 * BATCH, 8 * BATCH]
    run = guarded(tmp_path, Guarding(skipped_in_a_row=3), [1] * 5 + [NAN] * 4, checkpoints)
    assert run.rolled_back
    assert run.beats == [("the search for a checkpoint", 3600)]  # which reads all of it
    assert run.trainer.should_stop
    assert [p.name for p in folders(tmp_path / "checkpoints")] == ["images-000000000064", "images-000000000192"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "images-000000000192"
    assert (tmp_path / "checkpoints" / "aside-images-000000000256").is_dir()
    assert run.saved_at == 192
    (entry,) = json.loads((tmp_path / "rollbacks.json").read_text())
    reason = "3 steps in a row had a loss or a gradient that is not finite"
    assert entry == {"images_seen": 192, "left_out": 3 * BATCH, "reason": reason, "undone": False}


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path):
    guard = Guarding(skipped_in_a_row=2)
    guarded(tmp_path, Guarding(), [], [BATCH, 2 * BATCH])
    path = tmp_path / "checkpoints" / "images-000000000064" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    run = guarded(tmp_path, guard, [1, 1, 1, NAN, NAN, NAN])
    assert run.rolled_back
    assert re.search(r"going back to 32 \(not to a newer one: .*000064/rank-00000.*checksum", run.alerts[-1][1])
    assert Rollbacks(tmp_path).all[0].images_seen == BATCH


def test_without_a_checkpoint_or_after_the_last_rollback_it_stops_and_says_what_to_do(tmp_path):
    with pytest.raises(
        UserError, match=r"At 96 images 2 steps in a row .* no whole checkpoint from before. Begin anew"
    ):
        guarded(tmp_path, Guarding(skipped_in_a_row=2), [NAN] * 5)
    Rollbacks(tmp_path).add(0, 64, "once")
    with pytest.raises(UserError, match="1 rollbacks were of no use"):
        guarded(tmp_path, Guarding(skipped_in_a_row=2, rollbacks=1), [1, NAN, NAN, 1], [BATCH])


def test_a_row_goes_on_over_a_restart(tmp_path):
    first = guarded(tmp_path / "a", Guarding(skipped_in_a_row=4), [1, NAN, NAN])
    state = json.loads(json.dumps(first.state))
    again = guarded(tmp_path / "b", Guarding(skipped_in_a_row=4), [NAN, NAN, 1], [0], state, first.images_seen)
    assert again.rolled_back


def test_noise_of_any_size_and_a_falling_loss_are_no_spike(tmp_path):
    noise = np.random.default_rng(0)
    course = np.exp(-np.arange(6000) / 1500) + 0.1
    losses = course * noise.lognormal(0, 0.3, 6000)
    losses[noise.integers(0, 6000, 60)] *= 50  # single steps
    run = guarded(tmp_path, Guarding(), losses, [0])
    assert not run.stopping


def test_the_last_digits_of_a_loss_that_does_not_move_are_no_spike(tmp_path):
    losses = np.full(1400, 0.5)
    losses[1000:] += 1e-7
    assert not guarded(tmp_path, Guarding(), losses, [0]).stopping


@pytest.mark.parametrize("factor", [1.5, 3.0, 100.0])
def test_a_loss_that_rises_and_stays_is_one(tmp_path, factor):
    noise = np.random.default_rng(1)
    losses = 0.1 * noise.lognormal(0, 0.05, 1400)
    losses[1000:] *= factor
    checkpoints = [BATCH * n for n in (500, 980, 1010)]
    run = guarded(tmp_path, Guarding(), losses, checkpoints)
    assert run.rolled_back
    assert Rollbacks(tmp_path).all[0].images_seen == 980 * BATCH
    assert run.images_seen <= (1000 + 32) * BATCH  # when most of the recent steps are of that kind


def test_what_was_left_out_is_all_that_was_read_since_the_checkpoint(tmp_path):
    known = Rollbacks(tmp_path)
    known.add(64, 384, "a")  # read up to sample 384
    known.add(256, 352, "b")  # up to 352 + 320
    again = Rollbacks(tmp_path)
    assert [again.left_out(n) for n in (32, 64, 224, 256, 10**6)] == [0, 320, 320, 416, 416]
    known.add(64, 320, "c")  # up to 320 + 416: from 64 on nothing of it is read again
    again = Rollbacks(tmp_path)
    assert [again.left_out(n) for n in (32, 64, 256, 10**6)] == [0, 672, 672, 672]
    assert 64 + again.left_out(64) == 320 + 416
    again.forget_after(32)
    assert Rollbacks(tmp_path).left_out(10**6) == 0
    assert len(Rollbacks(tmp_path).all) == 3  # they still count


def test_every_start_logs_the_rollbacks_at_the_same_place(tmp_path):
    Rollbacks(tmp_path).add(2 * BATCH, 5 * BATCH, "a test")
    for seen in (2 * BATCH, 7 * BATCH):
        assert guarded(tmp_path, Guarding(), [], seen=seen).logged == [(2 * BATCH, {"train/rollbacks": 1})]


@pytest.mark.parametrize("wrong", [{"skipped_in_a_row": 0}, {"spike": 0.0}, {"spike": NAN}, {"rollbacks": -1}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        Guarding(**wrong)
