"""Learned uncertainty: its minimum is the logarithm of the mean loss; it is trained, averaged and saved."""

import pytest
import torch
from options import built, composed
from torch import nn
from torch.testing import assert_close

from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import Parts
from diffusion_trainer.conventions import UserError
from diffusion_trainer.objectives.denoising import Denoising
from diffusion_trainer.objectives.uncertainty import LearnedUncertainty, Uncertainty
from diffusion_trainer.process.predictions import V
from diffusion_trainer.process.timesteps import LogitNormal, Stratified
from diffusion_trainer.process.weightings import Unit
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoints import WEIGHT, Checkpoint, save
from diffusion_trainer.training.ema import KEY, attach_ema
from diffusion_trainer.training.model import Model
from diffusion_trainer.training.nonfinite import NonFinite
from diffusion_trainer.training.randomness import LaneDraws
from diffusion_trainer.training.sharding import Replicated

COSINE = built("schedule")["cosine"]
B = 512


class Number(nn.Module):
    """The same u at all levels, so that its minimum is one number."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, c_noise):
        return self.value.expand(len(c_noise))


def draws(count=B):
    return LaneDraws(0, 0, count, count, 1, torch.device("cpu"))


def denoising(timesteps=None):
    return Denoising(COSINE, V(), timesteps or Stratified(), Unit())


def data(count=B):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(1))


def network(x, *_):
    return 0.5 * x


@pytest.mark.parametrize("timesteps", [Stratified(), LogitNormal(0.0, 2.0, corrected=True)], ids=["even", "importance"])
def test_minimum_is_the_logarithm_of_the_mean_loss(timesteps):
    """With importance, that of the corrected mean: sum(w loss) / sum(w)."""
    objective, plain = LearnedUncertainty(denoising(timesteps)), denoising(timesteps)(network, data(), None, draws())
    best = (plain.loss.sum() / plain.importance.sum()).log().item()
    means, slopes = [], []
    for off in (0.0, 0.3, -0.3):
        objective.uncertainty = Number(best + off)
        loss = objective(network, data(), None, draws()).loss.mean()
        means.append(loss.item())
        slopes.append(torch.autograd.grad(loss, objective.uncertainty.value)[0].item())
    assert means[0] == pytest.approx(plain.importance.mean().item() * (1 + best), rel=1e-4)
    assert means[0] < min(means[1:]) - 0.01
    assert abs(slopes[0]) < 1e-4
    assert slopes[1] > 0.1
    assert slopes[2] < -0.1


def test_network_learns_from_each_level_over_its_uncertainty():
    objective, scale = LearnedUncertainty(denoising()), torch.tensor(0.5, requires_grad=True)
    with torch.no_grad():
        objective.uncertainty.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    terms = objective(lambda x, *_: scale * x, data(), None, draws())
    plain = denoising()(lambda x, *_: scale * x, data(), None, draws())
    u = objective.uncertainty(V().coefficients(COSINE, COSINE.level(plain.t)).noise).detach()
    assert u.std() > 0.1
    ours, by_hand = (torch.autograd.grad(loss.sum(), scale)[0] for loss in (terms.loss, plain.loss / u.exp()))
    assert_close(ours, by_hand, rtol=1e-4, atol=1e-4)


def test_at_first_it_is_the_loss_itself():
    terms, plain = (
        LearnedUncertainty(denoising())(network, data(), None, draws()),
        denoising()(network, data(), None, draws()),
    )
    for ours, theirs in zip(terms, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_it_learns_the_mean_loss_of_every_level():
    """Of any smooth loss: after training u is its logarithm, within what a few features can tell apart."""
    uncertainty = Uncertainty(128)
    optimizer = torch.optim.Adam(uncertainty.parameters(), 0.01)
    c_noise = torch.linspace(-2.5, 2.5, 400)
    mean_loss = 0.01 + torch.sigmoid(2 * c_noise)
    for _ in range(500):
        optimizer.zero_grad()
        u = uncertainty(c_noise)
        (mean_loss / u.exp() + u).mean().backward()
        optimizer.step()
    assert (uncertainty(c_noise) - mean_loss.log()).abs().mean() < 0.05


def test_features_are_the_same_for_every_seed_and_of_unit_variance():
    torch.manual_seed(1)
    first = Uncertainty(1000)
    torch.manual_seed(2)
    second = Uncertainty(1000)
    assert torch.equal(first.frequencies, second.frequencies)
    assert set(first.state_dict()) == {"linear.weight"}  # the others are not in checkpoints
    waves = 2**0.5 * (0.7 * first.frequencies + first.phases).cos()
    assert waves.square().mean().item() == pytest.approx(1, abs=0.1)
    with torch.no_grad():
        first.linear.weight.fill_(1.0)
    assert_close(first(torch.tensor([0.7]))[0], waves.sum(), rtol=1e-3, atol=1e-3)


def test_optimizer_average_and_checkpoint_have_it(tmp_path):
    """It is one of the model's parameters, by name, and so in all that walks them."""
    objective = composed("objective", "objective=uncertainty")
    conditioning = build({"_target_": "diffusion_trainer.conditioning.unconditional.Unconditional"}, "conditioning")
    net = nn.Conv2d(1, 1, 1)
    model = Parts(net, conditioning, objective).model(torch.float32)
    (name,) = [n for n, p in model.named_parameters() if p is objective.uncertainty.linear.weight]
    assert name.startswith("learned.")
    assert objective.uncertainty.linear.weight.requires_grad
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    attach_ema(optimizer, {KEY: lambda: 0.5}, NonFinite(optimizer))
    loss = objective(lambda x, *_: net(x), torch.randn(8, 1, 4, 4), None, draws(8)).loss.mean()
    loss.backward()
    optimizer.step()
    weight = objective.uncertainty.linear.weight.detach()
    assert weight.any()
    folder = save(tmp_path, 8, Replicated(model, optimizer), {}, Agreement(), 1)
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.whole(WEIGHT)[name], weight)
    assert_close(checkpoint.whole(KEY)[name], weight / 2)  # it started from 0


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="features must be positive"):
        LearnedUncertainty(denoising(), 0)
    with pytest.raises(UserError, match="schedule=learned needs"):
        composed("objective", "objective=uncertainty", "schedule=learned", "weighting=elbo_continuous")


def test_it_moves_with_the_model():
    objective = LearnedUncertainty(denoising())
    model = Model(nn.Identity(), build({"_target_": "diffusion_trainer.conditioning.unconditional.Unconditional"}, "c"),
                  learned=objective.learned)  # fmt: skip
    model.double()
    assert objective.uncertainty.frequencies.dtype == torch.float64
