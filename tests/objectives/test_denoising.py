"""The denoising objective with a perfect network: its minimum is known, and every deviation costs what theory says."""

import pytest
import torch
from exact import GAUSSIAN, MIXTURE, ExactNetwork
from options import built, composed, each, names
from torch.testing import assert_close

from diffusion_trainer.objectives.denoising import Denoising
from diffusion_trainer.process.predictions import Epsilon
from diffusion_trainer.process.timesteps import Stratified
from diffusion_trainer.process.variances import FixedLarge, FixedSmall
from diffusion_trainer.process.weightings import Elbo, Unit
from diffusion_trainer.training.randomness import LaneDraws

SCHEDULES = built("schedule")
every_schedule = each("schedule", SCHEDULES)
every_data = each("data", {"gaussian": GAUSSIAN, "mixture": MIXTURE})


def draws(count, first=0, batch_size=None):
    return LaneDraws(0, first, count, batch_size or count, 4, torch.device("cpu"))


def simple(schedule, weighting=None):
    return Denoising(schedule, Epsilon(), Stratified(), weighting or Unit())


def data_of(data, count):
    return data.sample(count, torch.Generator().manual_seed(1))[0].float()


def is_zero_on_average(values, standard_errors=5):
    return abs(values.mean()) < standard_errors * values.std() / len(values) ** 0.5


def minimum(data, schedule, x_0, d):
    """E|eps - E[eps|x_t]|^2 per dimension at the x_t that the objective sees: (alpha/sigma)^2 tr Cov[x_0|x_t] / D."""
    t, _ = Stratified()(schedule.t_range, d)
    alpha, sigma = schedule.alpha(t).double(), schedule.sigma(t).double()
    x_t = alpha[:, None] * x_0 + sigma[:, None] * d.normal("eps", (2,))
    covariance = data.posterior_covariance(x_t, alpha, sigma)
    return (alpha / sigma) ** 2 * covariance.diagonal(dim1=-2, dim2=-1).mean(1)


@every_schedule
@every_data
def test_loss_of_the_exact_network_is_the_posterior_variance(schedule, data):
    d, x_0 = draws(20_000), data_of(data, 20_000)
    loss = simple(schedule)(ExactNetwork(data), x_0, None, d).loss.double()
    known = minimum(data, schedule, x_0, d)
    assert is_zero_on_average(loss - known)
    assert loss.mean() > 10 * (loss - known).std() / len(loss) ** 0.5  # else the line above could not fail


DEVIATIONS = {
    "constant": lambda x, c_noise: torch.full_like(x, 0.2),
    "linear": lambda x, c_noise: 0.1 * x,
    "of the noise level": lambda x, c_noise: 0.1 * c_noise[:, None].sin().expand_as(x),
    "nonlinear": lambda x, c_noise: 0.2 * (3 * x).sin(),
}


@every_schedule
@every_data
@each("deviation", DEVIATIONS)
def test_every_deviation_from_the_exact_network_adds_its_square(schedule, data, deviation):
    exact, d, x_0 = ExactNetwork(data), draws(20_000), data_of(data, 20_000)
    squares = []

    def off(x, c_noise, condition):
        squares.append(deviation(x, c_noise).square().mean(1))
        return exact(x, c_noise) + deviation(x, c_noise)

    rise = simple(schedule)(off, x_0, None, d).loss - simple(schedule)(exact, x_0, None, d).loss
    assert is_zero_on_average(rise - squares[0])  # the error of E[eps|x_t] is orthogonal to all functions of x_t and t
    assert not is_zero_on_average(rise)
    assert rise.mean() > 0


@every_schedule
def test_simple_loss_is_the_unweighted_error_of_the_noise(schedule):
    terms = simple(schedule)(ExactNetwork(GAUSSIAN), data_of(GAUSSIAN, 64), None, draws(64))
    assert_close(terms.loss, terms.error, rtol=1e-3, atol=0)


@every_schedule
@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()], ids=str)
def test_losses_of_two_weightings_have_the_ratio_of_the_weights(schedule, variance):
    elbo, x_0 = Elbo(variance), data_of(GAUSSIAN, 64)
    a = simple(schedule)(ExactNetwork(GAUSSIAN), x_0, None, draws(64))
    b = simple(schedule, elbo)(ExactNetwork(GAUSSIAN), x_0, None, draws(64))
    assert torch.equal(a.t, b.t)
    assert torch.equal(a.error, b.error)
    assert_close(b.loss / a.loss, elbo(schedule, a.t) / Unit()(schedule, a.t), rtol=1e-3, atol=0)


@every_schedule
def test_elbo_loss_is_the_weighted_error_of_x_0(schedule):
    elbo, x_0, d = Elbo(FixedSmall()), data_of(GAUSSIAN, 64), draws(64)
    terms = simple(schedule, elbo)(lambda x, c_noise, condition: 0.5 * x, x_0, None, d)
    alpha, sigma = schedule.alpha(terms.t)[:, None], schedule.sigma(terms.t)[:, None]
    x_t = alpha * x_0 + sigma * d.normal("eps", (2,))
    x_0_hat = (x_t - sigma * 0.5 * x_t) / alpha
    expected = elbo(schedule, terms.t) * (x_0_hat - x_0).square().mean(1)
    assert_close(terms.loss, expected, rtol=1e-3, atol=0)


@every_schedule
def test_terms_are_per_sample_and_say_their_noise_level(schedule):
    terms = simple(schedule)(ExactNetwork(GAUSSIAN), data_of(GAUSSIAN, 64), None, draws(64))
    assert {tuple(term.shape) for term in terms} == {(64,)}
    assert torch.equal(terms.t, Stratified()(schedule.t_range, draws(64))[0])
    assert_close(terms.log_snr, schedule.log_snr(terms.t), rtol=1e-4, atol=1e-4)


def test_same_draws_give_the_same_loss_and_another_step_another():
    objective, x_0 = simple(SCHEDULES["cosine"]), data_of(GAUSSIAN, 64)
    first, again, later = (
        objective(ExactNetwork(GAUSSIAN), x_0, None, draws(64, step * 64)).loss for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert (first != later).all()


def test_a_loss_depends_on_no_other_sample_of_the_batch():
    objective, x_0 = simple(SCHEDULES["cosine"]), data_of(GAUSSIAN, 64)
    loss = objective(ExactNetwork(GAUSSIAN), x_0, None, draws(64)).loss
    x_0[3] += 1
    changed = objective(ExactNetwork(GAUSSIAN), x_0, None, draws(64)).loss != loss
    assert changed.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("pieces", [2, 4])
def test_losses_do_not_depend_on_who_computes_them(pieces):
    objective, x_0, size = simple(SCHEDULES["cosine"]), data_of(GAUSSIAN, 64), 64 // pieces
    whole = objective(ExactNetwork(GAUSSIAN), x_0, None, draws(64)).loss
    parts = [
        objective(ExactNetwork(GAUSSIAN), x_0[i : i + size], None, draws(size, i, 64)).loss for i in range(0, 64, size)
    ]
    assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


@every_schedule
def test_network_sees_x_t_and_a_quarter_of_its_log_snr_and_the_condition(schedule):
    seen, x_0, d, condition = [], data_of(GAUSSIAN, 8), draws(8), torch.arange(8)

    def network(*arguments):
        seen.append(arguments)
        return arguments[0]

    terms = simple(schedule)(network, x_0, condition, d)
    ((x, c_noise, given),) = seen
    alpha, sigma = schedule.alpha(terms.t)[:, None], schedule.sigma(terms.t)[:, None]
    assert_close(x, alpha * x_0 + sigma * d.normal("eps", (2,)))
    assert_close(c_noise, terms.log_snr / 4)
    assert given is condition


def test_gradient_is_that_of_the_networks_error_alone():
    scale, x_0, d = torch.tensor(0.7, requires_grad=True), data_of(GAUSSIAN, 64), draws(64)
    seen = []

    def network(x, c_noise, condition):
        seen.extend([x, c_noise])
        return scale * x

    terms = simple(SCHEDULES["cosine"])(network, x_0, None, d)
    assert not any(value.requires_grad for value in (*seen, terms.t, terms.log_snr))
    (gradient,) = torch.autograd.grad(terms.loss.sum(), scale)
    x_t = seen[0]
    off = (scale.detach() * x_t - d.normal("eps", (2,))).double()
    assert_close(gradient.double(), (2 * off * x_t).mean(1).sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_loss_is_float32_whatever_the_network_computes_in(dtype):
    objective, x_0 = simple(SCHEDULES["cosine"]), data_of(GAUSSIAN, 8)
    terms = objective(lambda x, c_noise, condition: x.to(dtype), x_0, None, draws(8))
    assert {term.dtype for term in terms} == {torch.float32}


@pytest.mark.parametrize("schedule", names("schedule"))
@pytest.mark.parametrize("objective", names("objective"))
def test_objectives_of_conf_are_finite_and_positive_on_images(objective, schedule):
    objective = composed("objective", f"objective={objective}", f"schedule={schedule}")
    terms = objective(lambda x, *_: 0.9 * x, torch.randn(64, 1, 8, 8), None, draws(64))
    assert terms.loss.shape == (64,)
    assert terms.loss.isfinite().all()
    assert (terms.loss > 0).all()
