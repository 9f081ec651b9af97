"""The denoising objective with a perfect network: its minimum is known, and every deviation costs what theory says."""

import pytest
import torch
from cases import each
from exact import GAUSSIAN, MIXTURE, ExactNetwork
from options import built, composed
from torch.testing import assert_close

from diffusion_trainer.conventions import expand
from diffusion_trainer.objectives.denoising import Denoising
from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.predictions import Epsilon
from diffusion_trainer.process.timesteps import LogitNormal, Stratified
from diffusion_trainer.process.variances import FixedLarge, FixedSmall
from diffusion_trainer.process.weightings import Elbo, MinSNR, Unit
from diffusion_trainer.training.randomness import LaneDraws

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
PREDICTIONS = built("prediction")
WEIGHTINGS = built("weighting")
COSINE = SCHEDULES["cosine"]
every_schedule = each("schedule", SCHEDULES)
every_prediction = each("prediction", PREDICTIONS)


def serves(prediction, schedule):
    try:
        prediction.check(schedule)
    except ValueError:
        return False
    return True


PAIRS = {
    f"{p}-{s}": (PREDICTIONS[p], SCHEDULES[s])
    for p in PREDICTIONS
    for s in SCHEDULES
    if serves(PREDICTIONS[p], SCHEDULES[s])
}
every_pair = each(("prediction", "schedule"), PAIRS)


def draws(count, first=0, batch_size=None):
    return LaneDraws(0, first, count, batch_size or count, 4, torch.device("cpu"))


def simple(schedule, weighting=None, prediction=None):
    return Denoising(schedule, prediction or Epsilon(), Stratified(), weighting or Unit())


def data_of(data, count):
    return data.sample(count, torch.Generator().manual_seed(1))[0].float()


def is_zero_on_average(values, standard_errors=5):
    return abs(values.mean()) < standard_errors * values.std() / len(values) ** 0.5


class Seen:
    """What the objective draws, in float64: level of (B,), x_t and eps (B, 2), and the coefficients of a prediction."""

    def __init__(self, schedule, prediction, x_0, d):
        t, _ = Stratified()(schedule, d)
        self.level = schedule.level(t.double())
        self.eps = d.normal("eps", (2,)).double()
        self.x_t = self.level.alpha[:, None] * x_0 + self.level.sigma[:, None] * self.eps
        self.coefficients = prediction.coefficients(schedule, self.level)
        self.target = prediction.target(x_0.double(), self.x_t, self.coefficients)


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


@every_pair
def test_loss_is_the_weight_times_the_error_of_x_0_whatever_is_predicted(prediction, schedule):
    """The same error of x_0 costs the same: weights need no conversion between predictions."""
    x_0, d = data_of(GAUSSIAN, 64), draws(64)
    seen = Seen(schedule, prediction, x_0, d)
    off = torch.randn(64, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    off *= (seen.level.sigma / seen.level.alpha)[:, None]  # as large as errors are at their level
    answer = seen.target + off / seen.coefficients.out[:, None]
    for weighting in WEIGHTINGS.values():
        loss = simple(schedule, weighting, prediction)(lambda *_: answer, x_0, None, d).loss
        expected = weighting(schedule, seen.level) * off.square().mean(1)
        assert_close(loss.double(), expected, rtol=1e-2, atol=0)


@every_schedule
def test_simple_loss_is_the_unweighted_error_of_the_noise(schedule):
    if serves(Epsilon(), schedule):
        terms = simple(schedule)(ExactNetwork(GAUSSIAN, schedule, Epsilon()), data_of(GAUSSIAN, 64), None, draws(64))
        assert_close(terms.loss, terms.error, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("prediction", "weighting"), [("x_0", "x_0"), ("v", "snr_plus_one"), ("flow", "flow"), ("edm", "edm")]
)
@every_schedule
def test_simple_losses_of_other_predictions_are_the_unweighted_error_of_their_output(schedule, prediction, weighting):
    objective = simple(schedule, WEIGHTINGS[weighting], PREDICTIONS[prediction])
    terms = objective(lambda x, *_: 0.5 * x, data_of(GAUSSIAN, 64), None, draws(64))
    assert_close(terms.loss, terms.error, rtol=1e-3, atol=0)


@every_pair
@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()], ids=str)
def test_losses_of_two_weightings_have_the_ratio_of_the_weights(prediction, schedule, variance):
    elbo, x_0, network = Elbo(variance), data_of(GAUSSIAN, 64), ExactNetwork(GAUSSIAN, schedule, prediction)
    a = simple(schedule, None, prediction)(network, x_0, None, draws(64))
    b = simple(schedule, elbo, prediction)(network, x_0, None, draws(64))
    assert torch.equal(a.t, b.t)
    assert torch.equal(a.error, b.error)
    level = schedule.level(a.t)
    assert_close(b.loss / a.loss, elbo(schedule, level) / Unit()(schedule, level), rtol=1e-3, atol=0)


@every_pair
def test_elbo_loss_is_the_weighted_error_of_the_denoisers_estimate(prediction, schedule):
    """Training and sampling read the network's output in the same way."""
    elbo, x_0, d = Elbo(FixedSmall()), data_of(GAUSSIAN, 16), draws(16)

    def network(x, *_):
        return 0.5 * x + 0.1

    terms = simple(schedule, elbo, prediction)(network, x_0, None, d)
    seen = Seen(schedule, prediction, x_0, d)
    denoise = NetworkDenoiser(network, lambda c: c, schedule, prediction)
    at = levels(schedule, terms.t)
    x_0_hat = torch.cat([denoise(seen.x_t[i : i + 1], at[i], None).x_0_hat for i in range(16)])
    expected = elbo(schedule, seen.level) * (x_0_hat - x_0).square().mean(1)
    assert_close(terms.loss.double(), expected, rtol=2e-3, atol=0)


@every_pair
def test_terms_are_per_sample_and_say_their_noise_level(prediction, schedule):
    network = ExactNetwork(GAUSSIAN, schedule, prediction)
    terms = simple(schedule, prediction=prediction)(network, data_of(GAUSSIAN, 64), None, draws(64))
    assert {tuple(term.shape) for term in terms} == {(64,)}
    t, importance = Stratified()(schedule, draws(64))
    assert torch.equal(terms.t, t)
    assert torch.equal(terms.importance, importance)
    assert_close(terms.log_snr, schedule.log_snr(terms.t), rtol=1e-4, atol=1e-4)


def test_importance_multiplies_the_loss_and_not_the_error():
    x_0, d, timesteps = data_of(GAUSSIAN, 64), draws(64), LogitNormal(0.0, 2.0, corrected=True)
    plain, corrected = (
        Denoising(COSINE, Epsilon(), t, Unit())(lambda x, *_: 0.5 * x, x_0, None, d)
        for t in (LogitNormal(0.0, 2.0), timesteps)
    )
    _, importance = timesteps(COSINE, d)
    assert torch.equal(plain.error, corrected.error)
    assert torch.equal(corrected.importance, importance)
    assert importance.std() > 0.1
    assert_close(corrected.loss, importance * plain.loss, rtol=1e-5, atol=0)


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


def test_a_learned_schedule_takes_only_losses_that_do_not_depend_on_it():
    learned = built("schedule")["learned"]
    for weighting in WEIGHTINGS.values():
        if weighting.invariant:
            assert simple(learned, weighting).learned == (learned,)
        else:
            with pytest.raises(ValueError, match=rf"{type(weighting).__name__}.*weighting=elbo_continuous"):
                simple(learned, weighting)


@pytest.mark.parametrize("name", ["elbo_continuous", "sigmoid"])
def test_a_learned_schedule_is_trained_to_lower_the_variance_of_the_loss(name):
    """Its gradient is that of the loss squared (Kingma et al. 2021, appendix I.2), the network's that of the loss."""
    learned, x_0, d = built("schedule")["learned"], data_of(GAUSSIAN, 16), draws(16)
    objective, parameters = simple(learned, WEIGHTINGS[name]), list(learned.parameters())
    scale = torch.tensor(0.7, requires_grad=True)

    def by_hand():
        """The loss per sample as one formula, all of it differentiable."""
        t, _ = Stratified()(learned, d)
        level, eps = learned.level(t), d.normal("eps", (2,))
        x_t = level.alpha[:, None] * x_0 + level.sigma[:, None] * eps
        weight = WEIGHTINGS[name](learned, level) * (level.sigma / level.alpha) ** 2
        return weight * (scale * x_t - eps).square().mean(1)

    loss = objective(lambda x, *_: scale * x, x_0, None, d).loss
    assert_close(loss, by_hand(), rtol=1e-3, atol=1e-4)
    own = torch.autograd.grad(loss.mean(), [scale, *parameters])
    assert_close(own[0], torch.autograd.grad(by_hand().mean(), scale)[0], rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(own[1:], torch.autograd.grad(by_hand().square().mean(), parameters), strict=True):
        assert_close(mine, theirs, rtol=2e-2, atol=1e-3 * theirs.abs().max().item())


def test_losses_of_min_snr_are_bounded_by_the_error_of_x_0():
    x_0, d = data_of(GAUSSIAN, 64), draws(64)
    ours, plain = (
        simple(COSINE, w)(lambda x, *_: 0.5 * x, x_0, None, d).loss for w in (MinSNR(5.0), WEIGHTINGS["x_0"])
    )
    assert (ours <= 5 * plain * (1 + 1e-5)).all()


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
