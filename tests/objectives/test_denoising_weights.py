"""The denoising loss is its weight times the error of x_0, whatever the network predicts and who weighs."""

import pytest
import torch
from exact import GAUSSIAN, ExactNetwork
from objectives.losses import (
    COSINE,
    PREDICTIONS,
    WEIGHTINGS,
    Seen,
    data_of,
    draws,
    every_pair,
    every_schedule,
    serves,
    simple,
)
from options import built
from torch.testing import assert_close

from diffusion_trainer.objectives.denoising import Denoising
from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.predictions import Epsilon
from diffusion_trainer.process.timesteps import LogitNormal, Stratified
from diffusion_trainer.process.variances import FixedLarge, FixedSmall
from diffusion_trainer.process.weightings import Elbo, MinSNR, Unit


@pytest.mark.slow
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
