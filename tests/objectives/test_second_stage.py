"""Second stage: both heads regress Var[eps | x_t], with the mean as it is, and train nothing else."""

from dataclasses import dataclass

import pytest
import torch
from cases import each
from exact import MIXTURE, ExactNetwork
from options import built, composed
from torch.testing import assert_close

from diffusion_trainer.apps.nodes import build
from diffusion_trainer.conventions import UserError, expand
from diffusion_trainer.objectives.denoising import Denoising
from diffusion_trainer.objectives.second_stage import NPR, SN, eps_hat
from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.predictions import Epsilon, V
from diffusion_trainer.process.timesteps import LogitNormal, Stratified, Timesteps
from diffusion_trainer.process.variances import NoiseVariance
from diffusion_trainer.process.weightings import Unit
from diffusion_trainer.training.randomness import LaneDraws

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
COSINE = SCHEDULES["cosine"]
every_schedule = each("schedule", SCHEDULES)
every_head = each("kind", {"npr": NPR, "sn": SN})
N = 20_000
# Of x_t in units of its own size; what a regression error is uncorrelated with, it cannot be improved by.
FUNCTIONS = {"one": torch.ones_like, "linear": lambda x: x, "square": lambda x: x**2, "wave": lambda x: (2 * x).sin()}


@dataclass(frozen=True)
class Constant(Timesteps):
    t: float

    def __call__(self, schedule, draws):
        return torch.full((draws.total,), self.t), torch.ones(draws.total)


def draws(count):
    return LaneDraws(0, 0, count, count, 1, torch.device("cpu"))


def objective(kind, schedule, timesteps=None, prediction=None):
    return kind(Denoising(schedule, prediction or V(), timesteps or Stratified(), Unit()))


def data(count):
    return MIXTURE.sample(count, torch.Generator().manual_seed(1))[0].float()


def of_noise(p):
    """Var[eps | x_t], (B, D) float64, at the x_t of a pass."""
    alpha, sigma = (value.double() for value in p.level[1:])
    diagonal = MIXTURE.posterior_covariance(p.x_t.double(), alpha, sigma).diagonal(dim1=-2, dim2=-1)
    return (alpha / sigma)[:, None] ** 2 * diagonal


def is_zero_on_average(values):
    return (values.mean(0).abs() < 5 * values.std(0) / len(values) ** 0.5).all()


def pass_of(this, schedule, second=None, off=0.0):
    """One pass of an exact network, whose estimate of the noise is moved by off sin(x_t)."""
    exact = ExactNetwork(MIXTURE, schedule, V())

    def network(x, c_noise, condition):
        first = exact(x, c_noise) + off * x.sin()
        return torch.cat([first, torch.zeros_like(x) if second is None else second], 1)

    return this.denoising.run(network, data(N), None, draws(N))


@every_schedule
@every_head
def test_target_is_the_variance_of_the_noise_on_average_whatever_x_t(kind, schedule):
    this = objective(kind, schedule)
    p = pass_of(this, schedule)
    error = this.target(p.eps, eps_hat(p)).double() - of_noise(p)
    scaled = p.x_t / (p.level.alpha**2 + p.level.sigma**2).sqrt()[:, None]
    for function in FUNCTIONS.values():
        assert is_zero_on_average(error * function(scaled))
    assert not is_zero_on_average(error + 0.1)  # what the lines above can tell


@every_schedule
def test_residual_of_a_wrong_mean_has_its_square_as_well(schedule):
    """Optimal for the mean as it is (Bao et al. 2022b, theorem 3); the squared noise does not know of it."""
    this = objective(NPR, schedule)
    p = pass_of(this, schedule, off=1.0)
    alpha, sigma = (value.double() for value in p.level[1:])
    truth = (p.x_t.double() - alpha[:, None] * MIXTURE.denoise(p.x_t.double(), alpha, sigma)) / sigma[:, None]
    wrong = eps_hat(p).double() - truth
    scaled = p.x_t / (p.level.alpha**2 + p.level.sigma**2).sqrt()[:, None]
    error = this.target(p.eps, eps_hat(p)).double() - of_noise(p) - wrong**2
    for function in FUNCTIONS.values():
        assert is_zero_on_average(error * function(scaled))
    assert not is_zero_on_average(error + wrong**2)
    assert not is_zero_on_average(objective(SN, schedule).target(p.eps, eps_hat(p)).double() - of_noise(p) - wrong**2)


@every_schedule
def test_estimate_of_the_noise_is_the_one_that_makes_x_t(schedule):
    p = pass_of(objective(NPR, schedule), schedule, off=0.3)
    again = expand(p.level.alpha, p.x_t) * p.x_0_hat + expand(p.level.sigma, p.x_t) * eps_hat(p)
    assert_close(again, p.x_t, rtol=1e-5, atol=1e-5)


@every_head
def test_loss_is_the_error_of_the_head_with_importance_and_without_the_weighting(kind):
    this = objective(kind, COSINE, LogitNormal(0.0, 2.0, corrected=True))
    second = torch.full((N, 2), 0.4)
    p = pass_of(this, COSINE, second)
    exact = ExactNetwork(MIXTURE, COSINE, V())
    terms = this(lambda x, c, _: torch.cat([exact(x, c), second], 1), data(N), None, draws(N))
    error = (0.4 - this.target(p.eps, eps_hat(p))).square().mean(1)
    assert_close(terms.error, error, rtol=1e-5, atol=1e-6)
    assert_close(terms.loss, terms.importance * error, rtol=1e-5, atol=1e-6)
    assert terms.importance.std() > 0.1


@every_head
def test_truth_is_the_best_constant_head(kind):
    """At one level: the loss's slope vanishes at the mean of Var[eps | x_t], and nowhere near."""
    this = objective(kind, COSINE, Constant(0.4))
    p = pass_of(this, COSINE)
    best = of_noise(p).mean(0)
    for off, zero in ((0.0, True), (0.05, False), (-0.05, False)):
        slope = best + off - this.target(p.eps, eps_hat(p)).double()
        assert bool(is_zero_on_average(slope)) is zero


@every_head
def test_no_gradient_reaches_the_mean(kind):
    mean, second = (torch.full((64, 2), v, requires_grad=True) for v in (0.1, 0.2))
    this = objective(kind, COSINE)
    loss = this(lambda *_: torch.cat([mean, second], 1), data(64), None, draws(64)).loss
    ours = torch.autograd.grad(loss.sum(), [mean, second])
    assert not ours[0].any()
    assert (ours[1] != 0).all()


@every_schedule
@pytest.mark.parametrize("variance", [built("variance")["npr"], built("variance")["sn"]], ids=["npr", "sn"])
def test_sampling_with_a_true_head_has_the_posterior_variance(schedule, variance):
    low, high = schedule.t_range
    at = levels(schedule, [high, (low + high) / 2, low])
    for t, s in zip(at, levels(schedule, [low + (high - low) * 0.2, low, 0.0]), strict=True):
        x_t = MIXTURE.sample_t(50, t.alpha, t.sigma, torch.Generator().manual_seed(0))
        covariance = MIXTURE.posterior_covariance(x_t, torch.tensor(t.alpha), torch.tensor(t.sigma))
        truth = covariance.diagonal(dim1=-2, dim2=-1)
        exact = ExactNetwork(MIXTURE, schedule, V())

        def network(x, c_noise, condition, t=t, truth=truth, exact=exact):
            return torch.cat([exact(x, c_noise), (t.alpha / t.sigma) ** 2 * truth], 1)

        estimate = NetworkDenoiser(network, lambda c: c, schedule, V())(x_t, t, None)
        given = variance.at(t, s)(estimate)
        if t.alpha:
            assert_close(given, truth.clamp(max=1.0), rtol=1e-6, atol=1e-9)
            assert_close(NoiseVariance(bound=None).at(t, s)(estimate), truth, rtol=1e-6, atol=1e-9)
        else:
            assert given == 1.0  # the bound: no residual of the noise says more
            assert NoiseVariance(bound=None).at(t, s)(estimate) == 0.0


@every_head
def test_only_the_second_head_trains(kind):
    this = objective(kind, COSINE)
    assert this.second
    assert this.trains("network.second_head.conv.weight")
    for name in (
        "network.conv_out.weight",
        "conditioning.embedding.weight",
        "network.second_headless.weight",
        "learned.0.w",
    ):
        assert not this.trains(name)


@pytest.mark.parametrize("name", ["npr", "sn"])
def test_conf_trains_a_head_that_exists_and_refuses_what_moves_the_mean(name):
    this = composed("objective", f"objective={name}")
    with torch.device("meta"):
        network = build({"_target_": "diffusion_trainer.networks.unet.UNet", "channels": 1, "condition_dim": 0,
                         "second_head": True}, "network")  # fmt: skip
    trained = [f"network.{n}" for n, _ in network.named_parameters() if this.trains(f"network.{n}")]
    assert trained == [f"network.second_head.{n}" for n, _ in network.second_head.named_parameters()]
    for refused in ("timesteps=loss_second_moment", "schedule=learned"):
        with pytest.raises(UserError, match="trains a head alone"):
            composed("objective", f"objective={name}", refused, "weighting=elbo_continuous")


def test_epsilon_prediction_gives_its_output_back():
    """x_0_hat divides by alpha and eps_hat multiplies by it again: in float32 that must not cost the digits."""
    for schedule in SCHEDULES.values():
        if schedule.at_noisy_end.alpha:
            this = objective(NPR, schedule, prediction=Epsilon())
            p = this.denoising.run(lambda x, *_: torch.cat([0.5 * x.sin(), x], 1), data(256), None, draws(256))
            assert_close(eps_hat(p), p.output, rtol=1e-3, atol=2e-4)
