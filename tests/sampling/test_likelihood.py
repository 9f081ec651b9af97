"""The likelihood of the probability-flow ODE against known densities, under every schedule of conf/schedule."""

from dataclasses import dataclass, replace
from itertools import product
from math import log

import pytest
import torch
from cases import each
from exact import GAUSSIAN, MIXTURE, ExactDenoiser
from options import built
from solving import Noise
from torch.special import ndtr

from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.denoiser import Denoiser, NetworkDenoiser
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.predictions import V
from diffusion_trainer.process.schedules import Cosine, RectifiedFlow
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.bound import VariationalBound
from diffusion_trainer.sampling.dequantization import TruncatedNormalDequantization, UniformDequantization, centres
from diffusion_trainer.sampling.likelihood import FlowLikelihood, in_bits_per_dim
from diffusion_trainer.sampling.noise import SampleNoise

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
EXACT = FlowLikelihood(UniformDequantization(), probes=0)
every_schedule = each("schedule", SCHEDULES)
every_data = each("data", {"gaussian": GAUSSIAN, "mixture": MIXTURE})


def samples(data, n=64):
    return data.sample(n, torch.Generator().manual_seed(0))[0]


def ends(schedule):
    """(alpha, sigma) at both ends of the range, as tensors."""
    return [
        tuple(torch.tensor(v, dtype=torch.float64) for v in level[1:]) for level in levels(schedule, schedule.t_range)
    ]


def cost(likelihood, data, schedule, x_0, noise=None):
    """-log p(x_0), (B,), in nats."""
    return sum(likelihood.terms(ExactDenoiser(data), schedule, x_0, None, noise).values())


def true_cost(data, x_0, alpha=1.0, sigma=0.0):
    """-log of the density of x_0 + (sigma / alpha) eps at x_0."""
    return -data.log_density(alpha * x_0, alpha, sigma) - x_0.shape[1] * log(alpha)


@every_schedule
def test_density_is_that_of_the_exact_flow_from_the_samplers_prior(schedule):
    """For a Gaussian the flow is known: log p = log p_min - log p_T(x_T) + log N(x_T; 0, sigma_T^2 I)."""
    x_0, (clean, noisy) = samples(GAUSSIAN), ends(schedule)
    x_T = GAUSSIAN.probability_flow(clean[0] * x_0, *clean, *noisy)
    prior = torch.distributions.Normal(0.0, noisy[1]).log_prob(x_T).sum(1)
    truth = true_cost(GAUSSIAN, x_0, *clean) + GAUSSIAN.log_density(x_T, *noisy) - prior
    likelihood = FlowLikelihood(UniformDequantization(), probes=0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(cost(likelihood, GAUSSIAN, schedule, x_0), truth, rtol=0, atol=2e-5)


@every_data
@every_schedule
def test_bits_per_dim_are_those_of_the_data(schedule, data):
    """To 0.01: against the density at the clean end, and against that of the data where that end is close to it."""
    x_0, (clean, _) = samples(data), ends(schedule)
    nats = {"flow": cost(EXACT, data, schedule, x_0)}
    bits = in_bits_per_dim(nats, 2, "")["bits_per_dim"].mean().item()
    assert abs(bits - true_cost(data, x_0, *clean).mean().item() / (2 * log(2))) < 0.01
    if clean[1] / clean[0] < 0.05:
        assert abs(bits - true_cost(data, x_0).mean().item() / (2 * log(2))) < 0.01


@every_schedule
def test_with_one_probe_they_are_as_well(schedule):
    """Hutchinson's estimate, as conf/likelihood has it, to 0.01: in the mean over the sign vectors of two dimensions,
    which are the probes' own error, each as often as the others (v and -v give the same).
    """
    x_0, (clean, _) = samples(MIXTURE).repeat(2, 1), ends(schedule)
    signs = torch.tensor([[0.3, 2.0], [0.1, -1.0]], dtype=torch.float64).repeat_interleave(64, 0)
    one = FlowLikelihood(UniformDequantization(), probes=1, rtol=1e-4, atol=1e-4)
    error = (cost(one, MIXTURE, schedule, x_0, lambda: signs) - true_cost(MIXTURE, x_0, *clean)) / (2 * log(2))
    assert error.std() > 0.01  # a single one is not exact
    assert abs(error.mean()) < 0.01


def test_nearly_all_schedules_are_close_to_the_data():
    """So the test above is about them."""
    far = [name for name, schedule in SCHEDULES.items() if ends(schedule)[0][1] > 0.05]
    assert len(far) <= 2 < len(SCHEDULES)
    assert any(ends(schedule)[1][0] == 0 for schedule in SCHEDULES.values())  # one with no signal at the noisy end


def test_pure_noise_at_the_end_has_no_prior_mismatch_in_any_sample():
    x_0 = samples(MIXTURE)
    ours = cost(EXACT, MIXTURE, RectifiedFlow(t_min=1e-4, t_max=1.0), x_0)
    torch.testing.assert_close(ours, true_cost(MIXTURE, x_0), rtol=0, atol=0.002)


def test_sign_vectors_are_unbiased():
    """The mean over all four sign vectors of two dimensions is the exact trace; single ones are not."""
    x_0 = samples(MIXTURE, 8)
    tight = FlowLikelihood(UniformDequantization(), probes=1, rtol=1e-7, atol=1e-7)
    each_sign = torch.stack(
        [
            cost(tight, MIXTURE, Cosine(), x_0, lambda v=v: torch.tensor(v, dtype=torch.float64).expand(8, 2) * 0.7)
            for v in product([-1, 1], repeat=2)
        ]
    )
    exact = cost(FlowLikelihood(UniformDequantization(), 0, 1e-7, 1e-7), MIXTURE, Cosine(), x_0)
    assert (each_sign - exact).abs().max() > 0.01
    torch.testing.assert_close(each_sign.mean(0), exact, rtol=0, atol=1e-5)


def test_several_probes_are_their_mean():
    x_0 = samples(MIXTURE, 8)
    one, two = (FlowLikelihood(UniformDequantization(), probes, 1e-7, 1e-7) for probes in (1, 2))
    noise = Noise(8)
    singly = [cost(one, MIXTURE, Cosine(), x_0, noise) for _ in range(2)]
    assert (singly[0] - singly[1]).abs().max() > 0.01
    together = cost(two, MIXTURE, Cosine(), x_0, Noise(8))
    torch.testing.assert_close(together, (singly[0] + singly[1]) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dequantization", [UniformDequantization(), TruncatedNormalDequantization(0.01)])
def test_bits_per_dim_of_pixels_are_those_of_their_bins(dequantization):
    """-log2 P(pixels) / D of a Gaussian that is independent in each dimension: its mass in the pixels' bins."""
    mean, std = torch.tensor([0.2, -0.3], dtype=torch.float64), torch.tensor([0.5, 0.3], dtype=torch.float64)
    data = type(GAUSSIAN).gaussian(mean, std.square().diag())
    pixels = torch.randint(40, 200, (256, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    schedule = RectifiedFlow(t_max=1.0)
    likelihood = FlowLikelihood(dequantization, probes=0)
    bits = likelihood(ExactDenoiser(data), schedule, FixedSmall(), pixels, None, Noise(256))
    x = centres(pixels)
    mass = ndtr((x + 1 / 255 - mean) / std) - ndtr((x - 1 / 255 - mean) / std)
    assert abs((bits["bits_per_dim"] + mass.log2().mean(1)).mean()) < 0.01


def in_few_steps(likelihood):
    return replace(likelihood, num_steps=50) if isinstance(likelihood, VariationalBound) else likelihood


def fitted(likelihood, schedule, data):
    """As it is asked: to the model of the data, if it has to be."""
    pixels = ((samples(data, max(likelihood.num_images, 1)) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return likelihood.fitted(ExactDenoiser(data), schedule, pixels, None, 0)


FITTED = {name: fitted(likelihood, Cosine(), GAUSSIAN) for name, likelihood in built("likelihood").items()}
OPTIONS = {name: in_few_steps(likelihood) for name, likelihood in FITTED.items()}


@each("likelihood", FITTED)
def test_every_option_gives_terms_that_sum(likelihood):
    pixels = torch.randint(0, 256, (5, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bits = likelihood(ExactDenoiser(GAUSSIAN), Cosine(), FixedSmall(), pixels, None, Noise(5))
    total = bits.pop("bits_per_dim")
    assert all(term.shape == (5,) and term.dtype == torch.float64 for term in bits.values())
    torch.testing.assert_close(sum(bits.values()), total)
    mass = GAUSSIAN.log_density(centres(pixels), torch.tensor(1.0), torch.tensor(0.0)) / log(2) / 2 - log(127.5) / log(
        2
    )
    assert abs((total + mass).mean()) < 1.5  # of some ten bits: FixedSmall's bound and one probe are not exact
    with pytest.raises(ValueError, match="uint8"):
        likelihood(ExactDenoiser(GAUSSIAN), Cosine(), FixedSmall(), pixels.double(), None, Noise(5))


@each("likelihood", OPTIONS)
def test_image_i_has_its_own_noise(likelihood):
    """Equal to the tolerance of the ODE, whatever the company; float32, as SampleNoise draws."""
    pixels = torch.randint(0, 256, (4, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def bits(numbers):
        noise = SampleNoise(0, numbers, (2,), torch.device("cpu"))
        args = Cosine(), FixedSmall(), pixels[numbers], None, noise
        return likelihood(ExactDenoiser(GAUSSIAN), *args)["bits_per_dim"]

    together = bits([0, 1, 2, 3])
    assert together[1] != together[2]
    torch.testing.assert_close(bits([2]), together[[2]], rtol=0, atol=2e-3)


def test_condition_reaches_the_denoiser():
    x_0, k = samples(MIXTURE.conditional(1), 16), torch.ones(16, dtype=torch.long)
    ours = sum(EXACT.terms(ExactDenoiser(MIXTURE), Cosine(), x_0, k, None).values())
    truth = true_cost(MIXTURE.conditional(1), x_0)
    assert abs((ours - truth).mean()) < 0.01


@each("likelihood", OPTIONS)
def test_likelihood_of_an_image_is_conditional(likelihood):
    """Pixels of component 0 are likelier given component 0 than given the other, which is elsewhere."""
    pixels = ((MIXTURE.means[:1].expand(16, 2).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def bits(k):
        condition = torch.full((16,), k)
        args = Cosine(), FixedSmall(), pixels, condition, Noise(16)
        return likelihood(ExactDenoiser(MIXTURE), *args)["bits_per_dim"].mean()

    assert bits(0) < bits(1) - 1


@dataclass(frozen=True)
class Broken(Denoiser):
    def __call__(self, x_t, level, condition):
        return Estimate(x_t * float("nan"))

    def null(self, condition):
        return None


@dataclass(frozen=True)
class NearlyStill(Broken):
    """dz/dp = RATE z: so slow that the solver's first trial step would leave the schedule."""

    def __call__(self, x_t, level, condition):
        p = level.sigma / (level.alpha + level.sigma)
        return Estimate(x_t / (level.alpha + level.sigma) * (1 - RATE * p))


RATE = 1e-4


def test_no_level_outside_the_schedule_is_asked_for():
    x_0, (clean, noisy) = samples(GAUSSIAN), ends(Cosine())
    p_min, p_T = clean[1] / sum(clean), noisy[1] / sum(noisy)
    z_T = (1 - p_min) * x_0 * (RATE * (p_T - p_min)).exp()
    log_density = torch.distributions.Normal(0.0, p_T).log_prob(z_T).sum(1) + 2 * RATE * (p_T - p_min)
    ours = sum(EXACT.terms(NearlyStill(), Cosine(), x_0, None, None).values())
    torch.testing.assert_close(ours, -log_density - 2 * (1 - p_min).log(), rtol=0, atol=1e-6)


@each("likelihood", OPTIONS)
def test_broken_networks_are_named_with_likelihood_and_schedule(likelihood):
    pixels = torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(UserError, match=rf"not finite.*\({type(likelihood).__name__} on Cosine\)"):
        likelihood(Broken(), Cosine(), FixedSmall(), pixels, None, Noise(2))


def test_refusals():
    with pytest.raises(ValueError, match="probes must be"):
        FlowLikelihood(UniformDequantization(), probes=-1)
    for wrong in ({"rtol": 0.0}, {"atol": float("nan")}, {"rtol": 1e-30}, {"atol": 2.0}):
        with pytest.raises(ValueError, match="rtol and atol must lie between"):
            FlowLikelihood(UniformDequantization(), **wrong)


def test_tolerances_below_the_rounding_of_the_network_are_refused_before_any_call():
    tight = FlowLikelihood(UniformDequantization(), rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match=r"cannot be met in torch\.float32"):
        tight.terms(Broken(), Cosine(), samples(GAUSSIAN, 2).float(), None, Noise(2))
    coarse = NetworkDenoiser(None, None, Cosine(), V(), torch.bfloat16)
    with pytest.raises(UserError, match=r"cannot be met in torch\.bfloat16"):
        EXACT.terms(coarse, Cosine(), samples(GAUSSIAN, 2), None, Noise(2))


@dataclass(frozen=True)
class Rough(Broken):
    """Of no smooth network: its estimates jump wherever x crosses a multiple of 0.001."""

    def __call__(self, x_t, level, condition):
        return Estimate(x_t.detach().div(0.001).floor().remainder(2) + 0 * x_t)


def test_the_number_of_network_calls_is_bounded_and_named(monkeypatch):
    monkeypatch.setattr("diffusion_trainer.sampling.adaptive.MAX_CALLS", 300)
    with pytest.raises(UserError, match=r"300 network calls on Cosine between .*: rtol=1e-05 and atol=1e-05"):
        EXACT.terms(Rough(), Cosine(), samples(GAUSSIAN, 2), None, None)
