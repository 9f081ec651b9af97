"""Weightings: the bound's weights against the KL of Gaussians the long way, the others in their papers' spaces."""

from math import exp

import pytest
import torch
from cases import each
from options import built, names
from oracle import forward_posterior, gaussian_kl
from torch.func import jvp
from torch.testing import assert_close

from diffusion_trainer.process.predictions import EDM, X0, Epsilon, Flow, V
from diffusion_trainer.process.variances import Estimate, FixedLarge, FixedSmall, ReverseStep, transition_variance
from diffusion_trainer.process.weightings import (
    P2,
    ContinuousElbo,
    EDMWeight,
    Elbo,
    MinSNR,
    Sigmoid,
    SoftMinSNR,
    Unit,
    UnitFlow,
    UnitV,
    UnitX0,
)

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
WEIGHTINGS = built("weighting")
every_schedule = each("schedule", SCHEDULES)
every_weighting = each("weighting", WEIGHTINGS)
every_variance = each("variance", [FixedSmall(), FixedLarge()])
every_step = each("k", [2, 3, 10, 250, 700, 999])
T = 1000


def times(schedule, count=101, dtype=torch.float64):
    return torch.linspace(*schedule.t_range, count, dtype=dtype)


def with_signal(schedule, count=101):
    """Levels of the range, the noisy end left out if it has no signal."""
    t = times(schedule, count)
    return schedule.level(t[schedule.alpha(t) > 0])


def snr(level):
    return (level.alpha / level.sigma) ** 2


class Step:
    """One reverse step k -> k-1 of a discrete process, random x_0 and x_0_hat, (4, 3); eps_hat goes with x_0_hat."""

    def __init__(self, schedule, variance, k):
        self.x_0, self.eps, self.eps_hat = torch.randn(
            3, 4, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64
        )
        self.t, self.s = (schedule.level(torch.full((4,), j / T, dtype=torch.float64)) for j in (k, k - 1))
        alpha, sigma = self.t.alpha[:, None], self.t.sigma[:, None]
        x_t = alpha * self.x_0 + sigma * self.eps
        self.x_0_hat = (x_t - sigma * self.eps_hat) / alpha
        ends = self.t.alpha, self.t.sigma, self.s.alpha, self.s.sigma
        self.mean, self.posterior_variance = forward_posterior(self.x_0, x_t, *ends)
        self.model_mean, _ = forward_posterior(self.x_0_hat, x_t, *ends)
        self.beta = self.t.sigma**2 - (self.t.alpha / self.s.alpha * self.s.sigma) ** 2
        large = self.beta[:, None].expand_as(self.mean)
        self.variance = self.posterior_variance if variance == FixedSmall() else large

    def kl(self):
        """KL(q(x_s|x_t,x_0) || p(x_s|x_t)), less the part of it that no network changes."""
        constant = gaussian_kl(self.mean, self.posterior_variance, self.mean, self.variance)
        return gaussian_kl(self.mean, self.posterior_variance, self.model_mean, self.variance) - constant

    def weighted(self, weight):
        return weight * (self.x_0_hat - self.x_0).square().sum(1) / T


@every_schedule
@every_variance
@every_step
def test_elbo_weight_is_the_kl_between_the_reverse_steps(schedule, variance, k):
    step = Step(schedule, variance, k)
    weighted = step.weighted(Elbo(variance, T)(schedule, step.t))
    assert_close(weighted, step.kl(), rtol=1e-6, atol=1e-12)  # Ho et al. 2020, eq. 8


@each("schedule", {name: schedule for name, schedule in SCHEDULES.items() if schedule.variance_preserving})
@every_variance
@every_step
def test_elbo_weight_is_equation_12_of_ho_on_the_error_of_the_noise(schedule, variance, k):
    step = Step(schedule, variance, k)
    alpha, alpha_bar = 1 - step.beta, step.t.alpha**2  # in Ho's letters
    coefficient = step.beta**2 / (2 * step.variance[:, 0] * alpha * (1 - alpha_bar))
    expected = coefficient * (step.eps - step.eps_hat).square().sum(1)
    assert_close(step.weighted(Elbo(variance, T)(schedule, step.t)), expected, rtol=1e-6, atol=1e-12)


@every_schedule
def test_elbo_weight_with_the_small_variance_is_half_the_difference_of_snrs(schedule):
    t = torch.linspace(2 / T, schedule.t_range[1], 500, dtype=torch.float64)  # Kingma et al. 2021, section 4
    difference = snr(schedule.level(t - 1 / T)) - snr(schedule.level(t))
    assert_close(Elbo(FixedSmall(), T)(schedule, schedule.level(t)), T / 2 * difference, rtol=1e-7, atol=0)


@every_schedule
@every_variance
def test_elbo_weight_tends_to_the_continuous_one(schedule, variance):
    """ContinuousElbo is the limit times the length of the range of t: then the mean over t uniform on the range is the
    bound's sum over that range. Elbo's own mean is over t uniform on [0, 1], of which the range is nearly all.
    """
    low, high = schedule.t_range
    t = torch.linspace(0.0155, 0.9855, 98, dtype=torch.float64)  # off the kinks of tables, at k / 1000
    level = schedule.level(t)
    _, rate = jvp(lambda t: snr(schedule.level(t)), (t,), (torch.ones_like(t),))
    limit = Elbo(variance, 10**6)(schedule, level)
    assert_close(limit, -rate / 2, rtol=1e-3, atol=0)  # Kingma et al. 2021, section 5
    assert_close(ContinuousElbo()(schedule, level), (high - low) * limit, rtol=1e-3, atol=0)


@every_schedule
def test_continuous_bound_is_half_the_rate_of_the_log_snr_on_the_error_of_the_noise(schedule):
    level = with_signal(schedule)
    low, high = schedule.t_range
    rate = -jvp(schedule.log_snr, (level.t,), (torch.ones_like(level.t),))[1]
    on_noise = ContinuousElbo()(schedule, level) * (level.sigma / level.alpha) ** 2
    assert_close(on_noise, (high - low) / 2 * rate, rtol=1e-6, atol=1e-9)  # Kingma et al. 2021, eq. 17


@every_schedule
def test_continuous_bound_of_a_constant_error_is_half_the_range_of_the_snr(schedule):
    """The mean over uniform t is the integral of the SNR over t: -1/2 int SNR'(t) dt (Kingma et al. 2021, eq. 18)."""
    low, high = schedule.t_range
    edges = torch.logspace(torch.tensor(low).log10(), torch.tensor(high).log10(), 40_001, dtype=torch.float64)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges.diff()
    weight = ContinuousElbo()(schedule, schedule.level(middle))
    first, last = (snr(schedule.level(edges[i])) for i in (0, -1))
    assert_close((weight * width).sum() / (high - low), (first - last) / 2, rtol=2e-3, atol=0)


@every_schedule
@every_variance
def test_first_step_is_a_gaussian_decoder_with_the_variance_of_the_second(schedule, variance):
    first, second = (schedule.level(torch.tensor([k / T], dtype=torch.float64)) for k in (1, 2))
    of_second = ReverseStep.of(second, first).variance(variance.at(second, first)(Estimate(first.t)))
    decoder = 1 / (2 * of_second)  # of -log N(x_0; x_0_hat, variance)
    assert_close(Elbo(variance, T)(schedule, first) / T, decoder, rtol=1e-9, atol=0)
    assert decoder.isfinite().all()
    if variance == FixedLarge():
        assert_close(of_second, transition_variance(second, first), rtol=1e-9, atol=0)


@every_schedule
@each(
    "pair",
    {
        "unit": (Unit(), Epsilon()),
        "x_0": (UnitX0(), X0()),
        "snr_plus_one": (UnitV(), V()),
        "flow": (UnitFlow(), Flow()),
        "edm": (EDMWeight(0.5), EDM(0.5)),
        "edm of other data": (EDMWeight(2.0), EDM(2.0)),
    },
)
def test_unit_weights_are_one_on_the_error_of_their_own_predictions_output(schedule, pair):
    weighting, prediction = pair
    level = with_signal(schedule)
    out = prediction.coefficients(schedule, level).out
    assert_close(weighting(schedule, level) * out**2, torch.ones_like(out), rtol=1e-9, atol=0)


def on_noise(weighting, schedule, level):
    return weighting(schedule, level) / snr(level)


def on_v(weighting, schedule, level):
    return weighting(schedule, level) / (snr(level) + 1)


@every_schedule
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_that_of_hang_in_each_space(schedule, gamma):
    level, weighting = with_signal(schedule), MinSNR(gamma)
    least = snr(level).minimum(torch.tensor(gamma))
    assert_close(weighting(schedule, level), least, rtol=1e-9, atol=0)  # Hang et al. 2023, section 3.4: on x_0,
    assert_close(on_noise(weighting, schedule, level), least / snr(level), rtol=1e-9, atol=0)  # on the noise,
    assert_close(on_v(weighting, schedule, level), least / (snr(level) + 1), rtol=1e-9, atol=0)  # and on v


@every_schedule
@pytest.mark.parametrize("gamma", [1.0, 4.0])
def test_soft_min_snr_lies_within_a_factor_of_two_below_min_snr(schedule, gamma):
    level = with_signal(schedule)
    soft, hard = SoftMinSNR(gamma)(schedule, level), MinSNR(gamma)(schedule, level)
    assert (soft < hard).all()
    assert (soft >= hard / 2 * (1 - 1e-12)).all()
    assert_close(1 / soft, 1 / snr(level) + 1 / gamma, rtol=1e-9, atol=0)  # Crowson et al. 2024, section 3.4


@every_schedule
@pytest.mark.parametrize(("k", "gamma"), [(1.0, 1.0), (0.5, 0.5), (2.0, 0.0)])
def test_p2_is_that_of_choi_on_the_error_of_the_noise(schedule, k, gamma):
    level = with_signal(schedule)
    expected = 1 / (k + snr(level)) ** gamma  # Choi et al. 2022, eq. 8, lambda being L_simple's
    assert_close(on_noise(P2(k, gamma), schedule, level), expected, rtol=1e-9, atol=0)


def test_p2_without_gamma_is_the_simple_loss_and_with_one_that_of_v_scaled():
    schedule = SCHEDULES["cosine"]
    level = with_signal(schedule)
    assert_close(P2(1.0, 0.0)(schedule, level), Unit()(schedule, level), rtol=1e-12, atol=0)
    assert_close(P2(1.0, 1.0)(schedule, level), level.alpha**2, rtol=1e-9, atol=0)  # SNR / (1 + SNR)


@every_schedule
def test_edm_weight_is_one_over_c_out_squared(schedule):
    level = with_signal(schedule)
    sigma = level.sigma / level.alpha  # theirs
    expected = (sigma**2 + 0.25) / (sigma * 0.5) ** 2  # Karras et al. 2022, table 1
    assert_close(EDMWeight(0.5)(schedule, level), expected, rtol=1e-9, atol=0)


@every_schedule
@pytest.mark.parametrize("bias", [-1.0, 2.0])
def test_sigmoid_weighs_the_bound_by_the_log_snr_alone(schedule, bias):
    level = with_signal(schedule)
    factor = (bias - schedule.log_snr(level.t)).sigmoid()  # Kingma and Gao 2023, table 1
    expected = factor * ContinuousElbo()(schedule, level)
    assert_close(Sigmoid(bias)(schedule, level), expected, rtol=1e-6, atol=0)


@every_schedule
def test_sigmoid_tends_to_the_bound_as_its_bias_grows(schedule):
    level, bound = schedule.level(times(schedule)), ContinuousElbo()
    assert_close(Sigmoid(60.0)(schedule, level), bound(schedule, level), rtol=1e-9, atol=0)
    weights = [Sigmoid(bias)(schedule, with_signal(schedule)) for bias in (-5.0, 0.0, 5.0)]
    assert (weights[0] < weights[1]).all()
    assert (weights[1] < weights[2]).all()


@each("weighting", {n: w for n, w in WEIGHTINGS.items() if w.invariant})
def test_invariant_weightings_give_all_schedules_of_the_same_ends_the_same_mean_loss(weighting):
    """For an error that depends on the noise level alone, here (SNR + 1)^-1 (Kingma et al. 2021, section 5.1)."""
    means = []
    learned = SCHEDULES["learned"]
    ends = learned.log_snr(torch.tensor(learned.t_range, dtype=torch.float64))
    for name in ("learned", "vp_sde", "edm", "rectified_flow"):
        schedule = SCHEDULES[name]
        first, last = schedule.t_of_log_snr(ends).tolist()
        edges = torch.logspace(*torch.tensor([first, last]).log10().tolist(), 20_001, dtype=torch.float64)
        level = schedule.level((edges[1:] + edges[:-1]) / 2)
        low, high = schedule.t_range
        loss = (
            weighting(schedule, level) / (high - low) / (snr(level) + 1)
        )  # the mean over t, of this part of the range
        means.append((loss * edges.diff()).sum())
    assert_close(torch.stack(means), torch.stack(means[:1] * len(means)), rtol=2e-3, atol=0)


def test_no_other_weighting_is_said_to_be_invariant():
    assert {name for name in names("weighting") if WEIGHTINGS[name].invariant} == {"elbo_continuous", "sigmoid"}


NO_WEIGHT_WITHOUT_SIGNAL = {"unit", "min_snr", "soft_min_snr", "p2", "elbo_continuous", "sigmoid"}  # as SNR -> 0


@every_schedule
@pytest.mark.parametrize("name", names("weighting"))
def test_weights_are_finite_and_positive_where_there_is_signal(schedule, name):
    level = schedule.level(times(schedule, 1001))
    weight = WEIGHTINGS[name](schedule, level)
    assert weight.shape == level.t.shape
    assert weight.isfinite().all()
    assert (weight[level.alpha > 0] > 0).all()
    assert ((weight[level.alpha == 0] == 0) == (name in NO_WEIGHT_WITHOUT_SIGNAL)).all()


@every_schedule
@every_weighting
def test_float32_keeps_three_digits(schedule, weighting):
    t = times(schedule, 1001, torch.float32)
    weight, exact = (weighting(schedule, schedule.level(v)) for v in (t, t.double()))
    assert weight.dtype == torch.float32
    assert_close(weight.double(), exact, rtol=1e-3, atol=0)


@every_schedule
@every_variance
def test_float32_keeps_three_digits_of_a_bound_of_many_steps(schedule, variance):
    """Neighbouring levels of a process of 100 thousand steps differ in the sixth digit."""
    t, weighting = times(schedule, 101, torch.float32), Elbo(variance, 100_000)
    weight, exact = (weighting(schedule, schedule.level(v)) for v in (t, t.double()))
    assert_close(weight.double(), exact, rtol=1e-3, atol=0)


@every_weighting
def test_a_weight_is_a_function_of_its_own_level_alone(weighting):
    schedule = SCHEDULES["cosine"]
    level = schedule.level(times(schedule, 20))
    alone = [weighting(schedule, schedule.level(t[None])) for t in level.t]
    assert_close(weighting(schedule, level), torch.cat(alone), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["elbo_continuous", "sigmoid"])
def test_bound_of_a_learned_schedule_has_its_gradient(name):
    """d/dw mean(weight * error) by autograd is that of finite differences."""
    schedule = built("schedule")["learned"].double()
    t = times(schedule, 21)

    def value():
        return WEIGHTINGS[name](schedule, schedule.level(t)).log().sum()

    (gradient,) = torch.autograd.grad(value(), schedule.weight_3)
    direction, h = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 1e-5
    with torch.no_grad():
        ends = []
        for step in (h, -2 * h):
            schedule.weight_3 += step * direction
            ends.append(value())
    assert_close((ends[0] - ends[1]) / (2 * h), gradient @ direction, rtol=1e-4, atol=1e-6)


def test_elbo_refuses_what_is_no_process_and_no_fixed_variance():
    with pytest.raises(ValueError, match="num_timesteps"):
        Elbo(FixedSmall(), 1)
    with pytest.raises(ValueError, match=r"must be fixed.*not str"):
        Elbo("beta")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_parameters_without_sense_are_refused(value):
    for kind, name in ((MinSNR, "gamma"), (SoftMinSNR, "gamma"), (P2, "k"), (EDMWeight, "sigma_data")):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            kind(**{name: value})
    if value != 0:
        with pytest.raises(ValueError, match="gamma must not be negative"):
            P2(gamma=value)


def test_sigmoid_shifts_by_its_bias():
    schedule = SCHEDULES["vp_sde"]
    level = with_signal(schedule)
    one, two = (ContinuousElbo()(schedule, level) / Sigmoid(bias)(schedule, level) - 1 for bias in (0.0, 2.0))
    assert_close(one, two * exp(2), rtol=1e-9, atol=1e-15)
