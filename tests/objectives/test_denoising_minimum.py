"""The loss of a perfect network is the posterior variance, and every deviation from it adds its square."""

import torch
from cases import each
from exact import GAUSSIAN, MIXTURE, ExactNetwork
from objectives.losses import (
    COSINE,
    PREDICTIONS,
    Seen,
    data_of,
    draws,
    every_pair,
    every_prediction,
    every_schedule,
    serves,
    simple,
)
from torch.testing import assert_close

from diffusion_trainer.process.predictions import Epsilon


def is_zero_on_average(values, standard_errors=5):
    return abs(values.mean()) < standard_errors * values.std() / len(values) ** 0.5


def minimum(data, seen):
    """E|eps - E[eps|x_t]|^2 per dimension at the x_t that the objective sees: (alpha/sigma)^2 tr Cov[x_0|x_t] / D."""
    _, alpha, sigma = seen.level
    covariance = data.posterior_covariance(seen.x_t, alpha, sigma)
    return (alpha / sigma) ** 2 * covariance.diagonal(dim1=-2, dim2=-1).mean(1)


@every_prediction
def test_loss_of_the_exact_network_is_the_posterior_variance_of_a_gaussian(prediction):
    check_minimum(prediction, COSINE, GAUSSIAN)


@every_pair
def test_loss_of_the_exact_network_is_the_posterior_variance_whatever_it_predicts(prediction, schedule):
    check_minimum(prediction, schedule, MIXTURE)


def check_minimum(prediction, schedule, data):
    d, x_0 = draws(4_000), data_of(data, 4_000)
    loss = simple(schedule, prediction=prediction)(ExactNetwork(data, schedule, prediction), x_0, None, d).loss.double()
    known = minimum(data, Seen(schedule, prediction, x_0, d))
    assert is_zero_on_average(loss - known)
    assert loss.mean() > 10 * (loss - known).std() / len(loss) ** 0.5  # else the line above could not fail


@every_schedule
def test_exact_losses_of_all_predictions_are_the_same_sample_by_sample(schedule):
    x_0, d = data_of(MIXTURE, 256), draws(256)
    losses = [
        simple(schedule, prediction=p)(ExactNetwork(MIXTURE, schedule, p), x_0, None, d).loss
        for p in PREDICTIONS.values()
        if serves(p, schedule)
    ]
    for loss in losses[1:]:
        # float32 inputs: where the noise is small, and where the posterior mean hardly depends on x_0, digits are few
        assert_close(loss, losses[0], rtol=2e-2, atol=1e-3)


DEVIATIONS = {
    "constant": lambda x, c_noise: torch.full_like(x, 0.2),
    "linear": lambda x, c_noise: 0.1 * x,
    "of the noise level": lambda x, c_noise: 0.2 * c_noise[:, None].sin().expand_as(x),
    "nonlinear": lambda x, c_noise: 0.2 * (3 * x).sin(),
}


def rise_and_squares(schedule, prediction, data, deviation, count):
    """By how much a deviation of the noise's estimate raises the simple loss, and its square, both (count,)."""
    exact, d, x_0 = ExactNetwork(data, schedule, prediction), draws(count), data_of(data, count)
    seen, squares = Seen(schedule, prediction, x_0, d), []
    per_noise = (seen.level.sigma / seen.level.alpha / seen.coefficients.out).float()[:, None]  # of F

    def off(x, c_noise, condition):
        eps_off = deviation(x, c_noise)
        squares.append(eps_off.square().mean(1))
        return exact(x, c_noise) + per_noise * eps_off

    objective = simple(schedule, prediction=prediction)
    return objective(off, x_0, None, d).loss - objective(exact, x_0, None, d).loss, squares[0]


@each("deviation", DEVIATIONS)
def test_every_deviation_from_the_exact_network_of_a_gaussian_adds_its_square(deviation):
    check_rise(COSINE, GAUSSIAN, deviation)


@every_schedule
@each("deviation", DEVIATIONS)
def test_every_deviation_from_the_exact_network_adds_its_square(schedule, deviation):
    check_rise(schedule, MIXTURE, deviation)


def check_rise(schedule, data, deviation):
    prediction = Epsilon() if serves(Epsilon(), schedule) else PREDICTIONS["v"]
    rise, squares = rise_and_squares(schedule, prediction, data, deviation, 10_000)
    assert is_zero_on_average(rise - squares)  # the error of E[eps|x_t] is orthogonal to all functions of x_t and t
    assert not is_zero_on_average(rise)
    assert rise.mean() > 0


@every_pair
def test_a_deviation_adds_its_square_whatever_is_predicted(prediction, schedule):
    rise, squares = rise_and_squares(schedule, prediction, MIXTURE, DEVIATIONS["nonlinear"], 4_000)
    assert is_zero_on_average(rise - squares)
    assert not is_zero_on_average(rise)
