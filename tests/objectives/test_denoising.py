"""The denoising objective: what the network is shown, what comes back, and that it is the same whoever computes it."""

import pytest
import torch
from exact import GAUSSIAN, ExactNetwork
from objectives.losses import (
    COSINE,
    SCHEDULES,
    WEIGHTINGS,
    Seen,
    data_of,
    draws,
    every_pair,
    every_prediction,
    serves,
    simple,
)
from options import composed
from torch.testing import assert_close

from diffusion_trainer.conventions import expand
from diffusion_trainer.process.predictions import Epsilon
from diffusion_trainer.process.timesteps import Stratified


@every_pair
def test_terms_are_per_sample_and_say_their_noise_level(prediction, schedule):
    network = ExactNetwork(GAUSSIAN, schedule, prediction)
    terms = simple(schedule, prediction=prediction)(network, data_of(GAUSSIAN, 64), None, draws(64))
    assert {tuple(term.shape) for term in terms} == {(64,)}
    t, importance = Stratified()(schedule, draws(64))
    assert torch.equal(terms.t, t)
    assert torch.equal(terms.importance, importance)
    assert_close(terms.log_snr, schedule.log_snr(terms.t), rtol=1e-4, atol=1e-4)


class Ends:
    """A batch of two at the very ends of what can be drawn."""

    place, total = torch.tensor([0, 1]), 2

    def uniform(self, stream):
        return torch.tensor([0.0, 1 - 2**-24])

    def normal(self, stream, shape):
        return torch.ones(2, *shape)


@every_pair
def test_losses_and_gradients_are_finite_at_the_very_ends_of_the_range(prediction, schedule):
    """Where alpha may be exactly 0: long trainings do draw it."""
    for weighting in WEIGHTINGS.values():
        scale = torch.tensor(0.5, requires_grad=True)
        terms = simple(schedule, weighting, prediction)(lambda x, *_, s=scale: s * x, torch.ones(2, 2), None, Ends())
        assert terms.loss.isfinite().all()
        assert terms.error.isfinite().all()
        terms.loss.sum().backward()
        assert scale.grad.isfinite()


def test_same_draws_give_the_same_loss_and_another_step_another():
    objective, x_0 = simple(COSINE), data_of(GAUSSIAN, 64)
    first, again, later = (
        objective(ExactNetwork(GAUSSIAN, COSINE, Epsilon()), x_0, None, draws(64, step * 64)).loss for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert (first != later).all()


def test_a_loss_depends_on_no_other_sample_of_the_batch():
    objective, x_0 = simple(COSINE), data_of(GAUSSIAN, 64)
    loss = objective(ExactNetwork(GAUSSIAN, COSINE, Epsilon()), x_0, None, draws(64)).loss
    x_0[3] += 1
    changed = objective(ExactNetwork(GAUSSIAN, COSINE, Epsilon()), x_0, None, draws(64)).loss != loss
    assert changed.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("pieces", [2, 4])
def test_losses_do_not_depend_on_who_computes_them(pieces):
    objective, x_0, size = simple(COSINE), data_of(GAUSSIAN, 64), 64 // pieces
    whole = objective(ExactNetwork(GAUSSIAN, COSINE, Epsilon()), x_0, None, draws(64)).loss
    parts = [
        objective(ExactNetwork(GAUSSIAN, COSINE, Epsilon()), x_0[i::pieces], None, draws(size, i, 64)).loss
        for i in range(pieces)
    ]
    assert_close(torch.stack(parts, 1).flatten(), whole, rtol=1e-5, atol=1e-6)


@every_pair
def test_network_sees_the_scaled_x_t_and_its_c_noise_and_the_condition(prediction, schedule):
    calls, x_0, d, condition = [], data_of(GAUSSIAN, 8), draws(8), torch.arange(8)

    def network(*arguments):
        calls.append(arguments)
        return arguments[0]

    simple(schedule, prediction=prediction)(network, x_0, condition, d)
    ((x, c_noise, given),) = calls
    seen = Seen(schedule, prediction, x_0, d)
    c = seen.coefficients
    assert x.dtype == c_noise.dtype == torch.float32
    assert_close(x.double(), expand(c.into, seen.x_t) * seen.x_t, rtol=1e-4, atol=1e-5)
    assert_close(c_noise.double(), c.noise, rtol=1e-4, atol=1e-4)
    assert given is condition


def test_gradient_is_that_of_the_networks_error_alone():
    scale, x_0, d = torch.tensor(0.7, requires_grad=True), data_of(GAUSSIAN, 64), draws(64)
    seen = []

    def network(x, c_noise, condition):
        seen.extend([x, c_noise])
        return scale * x

    terms = simple(COSINE)(network, x_0, None, d)
    assert not any(value.requires_grad for value in (*seen, terms.t, terms.log_snr))
    (gradient,) = torch.autograd.grad(terms.loss.sum(), scale)
    x_t = seen[0]
    off = (scale.detach() * x_t - d.normal("eps", (2,))).double()
    assert_close(gradient.double(), (2 * off * x_t).mean(1).sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_loss_is_float32_whatever_the_network_computes_in(dtype):
    objective, x_0 = simple(COSINE), data_of(GAUSSIAN, 8)
    terms = objective(lambda x, c_noise, condition: x.to(dtype), x_0, None, draws(8))
    assert {term.dtype for term in terms} == {torch.float32}


@every_prediction
def test_a_prediction_that_a_schedule_does_not_serve_is_refused(prediction):
    schedule = SCHEDULES["zero_terminal_snr"]
    if serves(prediction, schedule):
        assert simple(schedule, prediction=prediction).prediction is prediction
    else:
        with pytest.raises(ValueError, match=r"ZeroTerminalSNR"):
            simple(schedule, prediction=prediction)


@pytest.mark.parametrize("schedule", ["linear", "edm", "zero_terminal_snr", "learned"])
@pytest.mark.parametrize("objective", ["simple", "elbo"])
def test_objectives_of_conf_are_finite_and_positive_on_images(objective, schedule):
    # A learned schedule takes a bound that does not depend on it, one without signal a prediction that does without.
    weighting = ["weighting=elbo_continuous"] if schedule == "learned" else []
    objective = composed("objective", f"objective={objective}", f"schedule={schedule}", "prediction=v", *weighting)
    terms = objective(lambda x, *_: 0.9 * x, torch.randn(64, 1, 8, 8), None, draws(64))
    assert terms.loss.shape == (64,)
    assert terms.loss.isfinite().all()
    assert (terms.loss > 0).all()
