"""Other models' weights and estimates are read as they were meant, or refused."""

import pytest
import torch
import yaml
from exact import MIXTURE, ExactDenoiser, ExactNetwork
from options import built
from solving import Noise
from torch.testing import assert_close

from diffusion_trainer.apps import initial
from diffusion_trainer.apps.weak import OnItsSchedule
from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.predictions import V

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}


@pytest.mark.parametrize("theirs", SCHEDULES)
@pytest.mark.parametrize("ours", ["cosine", "edm", "zero_terminal_snr"])
def test_a_model_of_another_schedule_says_the_same_of_x_0(ours, theirs):
    schedule = SCHEDULES[theirs]
    network = NetworkDenoiser(ExactNetwork(MIXTURE, schedule, V()), lambda condition: condition, schedule, V())
    weak = OnItsSchedule(network, schedule)
    for level in levels(SCHEDULES[ours], torch.tensor([0.3, 0.5, 0.7])):
        (clean, noisy) = schedule.log_snr(torch.tensor(schedule.t_range, dtype=torch.float64)).tolist()
        if noisy < level.log_snr < clean:
            x = MIXTURE.sample_t(20, level.alpha, level.sigma, torch.Generator().manual_seed(0))
            exact = ExactDenoiser(MIXTURE)(x, level, None).x_0_hat
            assert_close(weak(x, level, None).x_0_hat, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("theirs", ["sqrt_linear", "edm", "learned"])
@pytest.mark.parametrize("t", [0.99, 0.999])
def test_noisier_than_its_range_it_still_sees_noise_of_its_own_size(theirs, t):
    schedule, level = SCHEDULES[theirs], SCHEDULES["cosine"].level_at(t)
    asked = []

    class Spy(ExactDenoiser):
        def __call__(self, x_t, level, condition):
            asked.append((x_t, level))
            return super().__call__(x_t, level, condition)

    x = MIXTURE.sample_t(500, level.alpha, level.sigma, torch.Generator().manual_seed(0))
    estimate = OnItsSchedule(Spy(MIXTURE), schedule)(x, level, None).x_0_hat
    ((seen, own),) = asked
    expected = (MIXTURE.covariance_t(own.alpha, own.sigma).trace() / 2).sqrt()
    assert (seen.std(0).square().mean().sqrt() / expected).item() == pytest.approx(1, abs=0.1)
    assert (estimate - ExactDenoiser(MIXTURE)(x, level, None).x_0_hat).square().mean().sqrt() < 0.25


def test_where_there_is_no_signal_it_is_asked_at_its_own_noisy_end():
    end, cosine = SCHEDULES["zero_terminal_snr"].at_noisy_end, SCHEDULES["cosine"]
    asked = []

    class Spy(ExactDenoiser):
        def __call__(self, x_t, level, condition):
            asked.append((x_t, level))
            return super().__call__(x_t, level, condition)

    x = Noise(5)()
    OnItsSchedule(Spy(MIXTURE), cosine)(x, end, None)
    ((seen, level),) = asked
    assert level == cosine.at_noisy_end
    assert_close(seen, cosine.at_noisy_end.sigma / end.sigma * x)


def test_on_its_own_schedule_it_is_shown_x_t_itself():
    cosine, asked = SCHEDULES["cosine"], []

    class Spy(ExactDenoiser):
        def __call__(self, x_t, level, condition):
            asked.append((x_t, level))
            return super().__call__(x_t, level, condition)

    x, level = Noise(5)(), cosine.level_at(0.4)
    OnItsSchedule(Spy(MIXTURE), cosine)(x, level, None)
    assert asked[0][0] is x
    assert asked[0][1] == level


def test_damaged_initial_weights_are_named(tmp_path):
    (tmp_path / initial.FILE).write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"initial.safetensors is damaged .* the run's train command writes it again"):
        initial.read(tmp_path)


@pytest.mark.parametrize("group", ["schedule", "prediction"])
def test_a_frozen_network_is_read_as_it_was_trained(tmp_path, monkeypatch, group):
    source = {"schedule": {"_target_": "a"}, "prediction": {"_target_": "b"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(source))
    monkeypatch.setattr(initial, "checkpoint_in", lambda path, key: path)
    monkeypatch.setattr(initial, "run_of", lambda path: tmp_path)
    monkeypatch.setattr(initial, "of", lambda source: {"weight": torch.zeros(1, 1)})
    model = torch.nn.Linear(1, 1, bias=False)
    other = {**source, "init_from": "runs/a", group: {"_target_": "c"}}
    initial.check(model, other, tmp_path)  # it is trained: it may learn to mean something else
    model.requires_grad_(False)
    initial.check(model, {**source, "init_from": "runs/a"}, tmp_path)
    with pytest.raises(UserError, match=f"init_from=runs/a was trained with another {group} .*same {group}="):
        initial.check(model, other, tmp_path)
