"""The hybrid objective: its bound is that of Gaussian conditioning, and teaches the variance alone, to its optimum."""

from dataclasses import dataclass

import pytest
import torch
from cases import each
from exact import ExactNetwork
from options import built, composed
from oracle import Mixture, forward_posterior, gaussian_kl
from torch.testing import assert_close

from diffusion_trainer.conventions import UserError
from diffusion_trainer.objectives.denoising import Denoising
from diffusion_trainer.objectives.hybrid import Hybrid
from diffusion_trainer.process.decoders import DiscretizedGaussian
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.predictions import V
from diffusion_trainer.process.timesteps import LogitNormal, Timesteps
from diffusion_trainer.process.variances import Estimate, Learned, ReverseStep
from diffusion_trainer.process.weightings import Unit
from diffusion_trainer.training.randomness import LaneDraws

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
COSINE = SCHEDULES["cosine"]
T = 1000
every_schedule = each("schedule", SCHEDULES)


@dataclass(frozen=True)
class At(Timesteps):
    """These times, (B,)."""

    t: torch.Tensor

    def __call__(self, schedule, draws):
        return self.t.float(), torch.ones(len(self.t))


def hybrid(schedule, t, prediction=None, **settings):
    return Hybrid(Denoising(schedule, prediction or V(), At(t), Unit()), **settings)


def draws(count):
    return LaneDraws(0, 0, count, count, 1, torch.device("cpu"))


def pixels(count, dim=3):
    """Of 8 bits, the two ends among them."""
    grey = torch.randint(0, 256, (count, dim), generator=torch.Generator().manual_seed(3))
    grey[0], grey[1] = 0, 255
    return grey / 127.5 - 1


def network(second):
    """Outputs that depend on x, and a second one that does as well, around the given number."""
    return lambda x, *_: torch.cat([0.5 * x + 0.1, second + 0.3 * x.sin()], 1)


def times_of(schedule, count=64):
    """From both ends of the range, and between: (count,) float32 as training draws them."""
    return torch.linspace(*schedule.t_range, count).clamp(*schedule.t_range)


def by_hand(schedule, t, p):
    """KL(q || p) per dimension, one sample at a time, from Gaussian conditioning and the paper's equation 15."""
    at, before = levels(schedule, [t.item(), t.item() - 1 / T])
    x_0, x_t, second = p.x_0.double(), p.x_t.double(), p.second.double()
    mean, kept = forward_posterior(x_0, x_t, at.alpha, at.sigma, before.alpha, before.sigma)
    guess, _ = forward_posterior(p.x_0_hat.double(), x_t, at.alpha, at.sigma, before.alpha, before.sigma)
    beta = torch.tensor(at.sigma**2 - (at.alpha / before.alpha * before.sigma) ** 2)
    f = (second + 1) / 2
    variance = torch.exp(f * beta.log() + (1 - f) * kept.log())
    return gaussian_kl(mean, kept, guess, variance) / x_0.shape[1]


@every_schedule
def test_bound_term_is_the_kl_divergence_from_the_forward_posterior(schedule):
    t = times_of(schedule)
    t = t[t > 1.6 / T]
    objective = hybrid(schedule, t, num_timesteps=T)
    p = objective.denoising.run(network(0.2), pixels(len(t)), None, draws(len(t)))
    terms = objective.bound_term(p)
    for i in range(len(t)):
        part = {name: getattr(p, name)[i : i + 1] for name in ("x_0", "x_t", "second", "output")}
        one = p._replace(**part, coefficients=type(p.coefficients)(*(c[i : i + 1] for c in p.coefficients)))
        assert_close(terms[i : i + 1].double(), by_hand(schedule, t[i].double(), one), rtol=2e-4, atol=1e-7)


@every_schedule
def test_first_step_is_the_decoder_between_half_of_beta_and_beta(schedule):
    """Whatever the rounding of t = 1/T in float32."""
    t = torch.full((8,), 1 / T)
    objective = hybrid(schedule, t, num_timesteps=T)
    p = objective.denoising.run(network(0.2), pixels(8), None, draws(8))
    (at,) = levels(schedule, t[:1])
    beta = at.sigma**2  # Var[x_t | x_0], as alpha_0 = 1
    variance = beta * 2.0 ** ((p.second.double() - 1) / 2)
    nats = -DiscretizedGaussian()(p.x_0.double(), p.x_0_hat.double(), variance) / 3
    assert_close(objective.bound_term(p).double(), nats, rtol=1e-5, atol=1e-7)


@every_schedule
def test_gradients_reach_the_second_output_alone_and_are_finite_at_all_times(schedule):
    t = torch.cat([times_of(schedule), torch.tensor([1 / T, 1.49 / T, 1.51 / T, 2 / T]).clamp(*schedule.t_range)])
    for value in (-1.5, -1.0, 0.0, 1.0, 1.5):
        mean, second = (torch.full((len(t), 3), v, requires_grad=True) for v in (0.1, value))
        objective = hybrid(schedule, t)
        x_0 = pixels(len(t))
        p = objective.denoising.run(lambda x, *_, m=mean, s=second: torch.cat([m, s], 1), x_0, None, draws(len(t)))
        gradient = torch.autograd.grad(objective.bound_term(p).sum(), [mean, second], allow_unused=True)
        assert gradient[0] is None or not gradient[0].any()
        assert gradient[1].isfinite().all()
        assert (gradient[1] != 0)[t > 1.5 / T].all()  # a decoder that is sure of a pixel has none
        loss = objective(lambda x, *_, m=mean, s=second: torch.cat([m, s], 1), x_0, None, draws(len(t))).loss
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), [mean, second]))


@every_schedule
def test_second_outputs_below_beta_tilde_are_pushed_up(schedule):
    """The optimal variance is never below beta-tilde; a network that strays there must find its way back."""
    t = times_of(schedule)
    t = t[t > 1.6 / T]
    second = torch.full((len(t), 3), -1.5, requires_grad=True)
    objective = hybrid(schedule, t)
    p = objective.denoising.run(lambda x, *_: torch.cat([0 * x, second], 1), pixels(len(t)), None, draws(len(t)))
    (gradient,) = torch.autograd.grad(objective.bound_term(p).sum(), second)
    assert (gradient < 0).all()


@every_schedule
@pytest.mark.parametrize("place", [0.02, 0.5, 1.0])
def test_best_constant_second_output_gives_the_optimal_variance(schedule, place):
    """Isotropic data, so that one number is optimal; with the exact mean the bound has its minimum there."""
    data, n, steps = Mixture.gaussian([0.3, -0.2], 0.2 * torch.eye(2)), 10_000, 20
    low, high = schedule.t_range
    time = torch.tensor(max(low + place * (high - low), 2 / steps)).clamp(max=high)
    t, s = levels(schedule, [time.item(), time.double().item() - 1 / steps])
    best = data.optimal_variance(s.alpha, s.sigma, t.alpha, t.sigma).item()
    assert best == pytest.approx(
        ReverseStep.of(t, s).variance(Learned().at(t, s)(second_of(best, t, s))).item(), rel=1e-6
    )
    objective = hybrid(schedule, time.expand(n), num_timesteps=steps)
    exact = ExactNetwork(data, schedule, V())
    x_0 = data.sample(n, torch.Generator().manual_seed(1))[0].float()
    slopes = []
    for off in (0.0, 0.2, -0.2):
        second = (second_of(best, t, s).second + off).float().expand(n, 2).clone().requires_grad_()
        p = objective.denoising.run(lambda x, c, _, v=second: torch.cat([exact(x, c), v], 1), x_0, None, draws(n))
        (gradient,) = torch.autograd.grad(objective.bound_term(p).sum(), second)
        slopes.append(gradient.sum(1).double())
    error = slopes[0].std() / n**0.5
    assert abs(slopes[0].mean()) < 5 * error
    assert slopes[1].mean() > 5 * error  # else the line above could not fail
    assert slopes[2].mean() < -5 * error


def second_of(variance, t, s):
    """The second output that means this variance of the step."""
    kept, beta = ReverseStep.of(t, s).kept, t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
    f = torch.tensor(variance / kept, dtype=torch.float64).log() / torch.tensor(beta / kept, dtype=torch.float64).log()
    return Estimate(torch.zeros(1, 1), (2 * f - 1).reshape(1, 1))


@pytest.mark.parametrize("weight", [0.001, 0.5])
@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_loss_is_the_simple_one_and_the_weighted_sum_of_all_terms(weight, num_timesteps):
    timesteps = LogitNormal(0.0, 2.0, corrected=True)
    simple = Denoising(COSINE, V(), timesteps, Unit())
    objective, x_0 = Hybrid(simple, weight, num_timesteps), pixels(64)
    terms, plain = objective(network(0.2), x_0, None, draws(64)), simple(network(0.2), x_0, None, draws(64))
    p = simple.run(network(0.2), x_0, None, draws(64))
    assert terms.importance.std() > 0.1
    extra = terms.importance * weight * num_timesteps * objective.bound_term(p)
    assert_close(terms.loss, plain.loss + extra, rtol=1e-5, atol=1e-6)
    assert (extra > 1e-3 * plain.loss).any()
    for name in ("error", "t", "log_snr", "importance"):
        assert torch.equal(getattr(terms, name), getattr(plain, name))


def test_gradient_of_the_mean_is_that_of_the_simple_loss():
    mean, second = (torch.full((64, 3), v, requires_grad=True) for v in (0.1, 0.2))
    objective, x_0 = hybrid(COSINE, times_of(COSINE), vlb_weight=10.0), pixels(64)

    def outputs(x, *_):
        return torch.cat([mean, second], 1)

    (ours,) = torch.autograd.grad(objective(outputs, x_0, None, draws(64)).loss.sum(), mean)
    (simple,) = torch.autograd.grad(objective.denoising(outputs, x_0, None, draws(64)).loss.sum(), mean)
    assert torch.equal(ours, simple)


def test_what_makes_no_sense_is_refused():
    denoising = hybrid(COSINE, times_of(COSINE)).denoising
    for settings in ({"vlb_weight": 0.0}, {"num_timesteps": 1}):
        with pytest.raises(ValueError, match="vlb_weight must be positive"):
            Hybrid(denoising, **settings)
    with pytest.raises(UserError, match="Hybrid"):
        composed("objective", "objective=hybrid", "schedule=learned", "weighting=elbo_continuous")


def test_conf_makes_one_that_asks_for_a_second_output():
    objective = composed("objective", "objective=hybrid")
    assert isinstance(objective, Hybrid)
    assert objective.second
    assert objective.learned == ()
    assert objective.trains("network.conv_in.weight")
