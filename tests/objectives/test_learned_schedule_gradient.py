"""The gradient of a learned schedule is that of the squared loss, the network's that of the loss; the mean loss is the
same for every schedule.
"""

import pytest
import torch
from cases import each
from exact import MIXTURE, ExactNetwork
from options import built
from torch import nn
from torch.testing import assert_close

from diffusion_trainer.conventions import expand
from diffusion_trainer.objectives.denoising import Denoising
from diffusion_trainer.process.learned_schedule import LearnedSchedule, LogSNRTable
from diffusion_trainer.process.timesteps import LogitNormal, Stratified
from diffusion_trainer.training.randomness import LaneDraws

PREDICTIONS, WEIGHTINGS = built("prediction"), built("weighting")
INVARIANT = {name: w for name, w in WEIGHTINGS.items() if w.invariant}
EVERY_TIMESTEPS = {**built("timesteps"), "logit_normal, corrected": LogitNormal(0.0, 2.0, corrected=True)}
TIMESTEPS = {name: timesteps for name, timesteps in EVERY_TIMESTEPS.items() if timesteps.unbiased}


def moved(seed):
    """A learned schedule with parameters far from where they start."""
    schedule, generator = LearnedSchedule(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter.add_(3 * torch.randn(parameter.shape, generator=generator))
    return schedule


def draws(count, step=0):
    return LaneDraws(0, step * count, count, count, 1, torch.device("cpu"))


def data(count):
    return MIXTURE.sample(count, torch.Generator().manual_seed(1))[0].float()


def small_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    return net, lambda x, c_noise, condition: net(torch.cat([x, c_noise[:, None]], 1))


def direct(objective, network, x_0, d):
    """(B,) losses as one formula, without clones and hooks: differentiable in everything."""
    schedule, prediction = objective.schedule, objective.prediction
    t, importance = objective.timesteps(schedule, d)
    level = schedule.level(t)
    c = prediction.coefficients(schedule, level)
    eps = d.normal("eps", (2,))
    x_t = expand(level.alpha, x_0) * x_0 + expand(level.sigma, x_0) * eps
    x_0_hat = expand(c.skip, x_t) * x_t + expand(c.out, x_t) * network(expand(c.into, x_t) * x_t, c.noise, None)
    return importance * objective.weighting(schedule, level) * (x_0_hat - x_0).square().mean(1)


@each("prediction", PREDICTIONS)
@each("weighting", INVARIANT)
@each("timesteps", TIMESTEPS)
def test_schedule_has_the_gradient_of_the_square_and_the_network_that_of_the_loss(prediction, weighting, timesteps):
    schedule = moved(0)
    objective = Denoising(schedule, prediction, timesteps, weighting)
    net, network = small_network()
    x_0, own, theirs = data(64), list(schedule.parameters()), list(net.parameters())
    ours = torch.autograd.grad(objective(network, x_0, None, draws(64)).loss.mean(), own + theirs)
    of_loss = torch.autograd.grad(direct(objective, network, x_0, draws(64)).mean(), theirs)
    of_square = torch.autograd.grad(direct(objective, network, x_0, draws(64)).square().mean(), own)
    for mine, known in zip(ours, (*of_square, *of_loss), strict=True):
        assert_close(mine, known, rtol=1e-2, atol=2e-3 * known.abs().max().item())


def test_it_is_not_the_gradient_of_the_loss():
    schedule = moved(0)
    objective = Denoising(schedule, PREDICTIONS["epsilon"], Stratified(), WEIGHTINGS["elbo_continuous"])
    _, network = small_network()
    ours = torch.autograd.grad(objective(network, data(64), None, draws(64)).loss.mean(), list(schedule.parameters()))
    of_loss = torch.autograd.grad(direct(objective, network, data(64), draws(64)).mean(), list(schedule.parameters()))
    assert any((a - b).norm() > 0.5 * b.norm() for a, b in zip(ours, of_loss, strict=True))


def test_gradients_of_two_halves_of_a_batch_are_those_of_the_whole():
    """As micro-batches accumulate them: the hooks hold no state from one pass to the next."""
    schedule = moved(0)
    objective = Denoising(schedule, PREDICTIONS["v"], Stratified(), WEIGHTINGS["elbo_continuous"])
    net, network = small_network()
    parameters, x_0 = [*schedule.parameters(), *net.parameters()], data(64)
    whole = torch.autograd.grad(
        objective(network, x_0, None, LaneDraws(0, 0, 64, 64, 2, x_0.device)).loss.mean(), parameters
    )
    halves = [objective(network, x_0[i::2], None, LaneDraws(0, i, 32, 64, 2, x_0.device)).loss.mean() for i in (0, 1)]
    parts = [torch.autograd.grad(half, parameters) for half in halves]
    for a, b, c in zip(whole, *parts, strict=True):
        assert_close(a, (b + c) / 2, rtol=1e-3, atol=1e-4 * a.abs().max().item())


@each("weighting", WEIGHTINGS)
def test_weightings_whose_loss_depends_on_the_schedule_are_named_and_refused(weighting):
    if weighting.invariant:
        assert Denoising(moved(0), PREDICTIONS["v"], Stratified(), weighting).learned
    else:
        with pytest.raises(
            ValueError, match=rf"{type(weighting).__name__}'s loss.*weighting=elbo_continuous or sigmoid"
        ):
            Denoising(moved(0), PREDICTIONS["v"], Stratified(), weighting)


@each("timesteps", EVERY_TIMESTEPS)
def test_timesteps_whose_mean_loss_depends_on_the_schedule_are_refused(timesteps):
    """With the exact network it does: noise levels that are seldom drawn cost little (seen: 4.4 to 24 of 6.1)."""
    if timesteps.unbiased:
        assert Denoising(moved(0), PREDICTIONS["v"], timesteps, WEIGHTINGS["elbo_continuous"]).learned
        return
    with pytest.raises(ValueError, match=f"{type(timesteps).__name__} seldom draws.*timesteps=stratified"):
        Denoising(moved(0), PREDICTIONS["v"], timesteps, WEIGHTINGS["elbo_continuous"])
    means = mean_losses(timesteps, WEIGHTINGS["elbo_continuous"])[0]
    assert max(means) > 1.2 * min(means)


@each("timesteps", TIMESTEPS)
@each("weighting", INVARIANT)
def test_mean_loss_is_the_same_for_every_schedule_with_the_same_ends(weighting, timesteps):
    """With the exact network, over many t; its spread is not, which is what there is to train."""
    means, errors, spreads = mean_losses(timesteps, weighting)
    for mean, error in zip(means[1:], errors[1:], strict=True):
        assert abs(mean - means[0]) < 5 * (error + errors[0])
        assert mean > 10 * (error + errors[0])  # what the line above can tell
    assert max(spreads) > 1.1 * min(spreads)


def mean_losses(timesteps, weighting):
    """Of the exact network on four schedules with the same ends: means, their errors, and deviations."""
    means, errors, spreads = [], [], []
    share = torch.linspace(0, 1, 4097, dtype=torch.float64)
    tables = [LogSNRTable(13.3 - 18.3 * (0.1 * share + 0.9 * share**power), 0.001) for power in (3, 8)]
    for frozen in (LearnedSchedule().frozen(), moved(0).frozen(), *tables):
        objective = Denoising(frozen, PREDICTIONS["v"], timesteps, weighting)
        loss = objective(
            ExactNetwork(MIXTURE, frozen, PREDICTIONS["v"]), data(20_000), None, draws(20_000)
        ).loss.double()
        means.append(loss.mean())
        spreads.append(loss.std())
        errors.append(loss.std() / len(loss) ** 0.5)
    return means, errors, spreads


@pytest.mark.slow
def test_a_step_down_the_gradient_lowers_the_variance_and_not_the_mean():
    schedule = moved(1)
    objective = Denoising(schedule, PREDICTIONS["v"], Stratified(), WEIGHTINGS["elbo_continuous"])
    optimizer = torch.optim.Adam(schedule.parameters(), 0.1)
    net, _ = small_network()
    x_0 = data(4096)

    def network(x, c_noise, condition):
        with torch.no_grad():
            return net(torch.cat([x, c_noise[:, None]], 1))

    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = objective(network, x_0, None, draws(4096)).loss
        losses.append(loss.detach())
        loss.mean().backward()
        optimizer.step()
    assert losses[-1].std() < 0.98 * losses[0].std()
    assert losses[-1].mean().item() == pytest.approx(losses[0].mean().item(), rel=0.1)
