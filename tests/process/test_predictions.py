"""Predictions: the algebra of target and estimate, for every yaml of conf/prediction on every schedule it serves."""

import pytest
import torch
from cases import each
from exact import GAUSSIAN, MIXTURE, ExactNetwork
from options import built, names
from oracle import forward_posterior
from torch.testing import assert_close

from diffusion_trainer.conventions import expand
from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.predictions import EDM, MAX_LOG_SNR, Epsilon, PosteriorMean, Score

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
PREDICTIONS = built("prediction")
every_schedule = each("schedule", SCHEDULES)
every_prediction = each("prediction", PREDICTIONS)
every_data = each("data", {"gaussian": GAUSSIAN, "mixture": MIXTURE})


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


class Noisy:
    """Images at 9 times of a schedule, both ends among them: x_0, eps, x_t (9, 2, 3, 3) in float64."""

    def __init__(self, schedule):
        generator = torch.Generator().manual_seed(0)
        self.x_0, self.eps = torch.randn(2, 9, 2, 3, 3, generator=generator, dtype=torch.float64)
        self.schedule, self.t = schedule, torch.linspace(*schedule.t_range, 9, dtype=torch.float64)
        self.level = schedule.level(self.t)
        self.alpha, self.sigma = (expand(v, self.x_0) for v in (self.level.alpha, self.level.sigma))
        self.x_t = self.alpha * self.x_0 + self.sigma * self.eps

    def target(self, prediction):
        return prediction.target(self.x_0, self.x_t, prediction.coefficients(self.schedule, self.level))

    def estimate(self, prediction, output):
        """x_0_hat of the denoiser whose network says `output`, level by level."""
        rows = []
        for i, level in enumerate(levels(self.schedule, self.t)):
            network = lambda x, c_noise, condition, i=i: output[i : i + 1]  # noqa: E731
            denoise = NetworkDenoiser(network, lambda condition: condition, self.schedule, prediction)
            rows.append(denoise(self.x_t[i : i + 1], level, None).x_0_hat)
        return torch.cat(rows)


@every_pair
def test_estimate_of_the_target_is_x_0(prediction, schedule):
    noisy = Noisy(schedule)
    assert_close(noisy.estimate(prediction, noisy.target(prediction)), noisy.x_0, rtol=1e-9, atol=1e-9)


@every_pair
def test_error_of_x_0_is_the_output_coefficient_times_the_error_of_the_output(prediction, schedule):
    noisy = Noisy(schedule)
    off = noisy.estimate(prediction, noisy.target(prediction) + noisy.eps) - noisy.x_0
    out = expand(prediction.coefficients(schedule, noisy.level).out, off)
    assert_close(off, out * noisy.eps, rtol=1e-9, atol=1e-9)


@every_pair
def test_coefficients_are_one_finite_number_for_each_sample(prediction, schedule):
    t = torch.linspace(*schedule.t_range, 101, dtype=torch.float64)
    exact = prediction.coefficients(schedule, schedule.level(t))
    assert all(c.shape == t.shape and c.isfinite().all() for c in exact)
    assert (exact.out != 0).all()  # else no target


@every_pair
def test_coefficients_keep_three_digits_in_float32(prediction, schedule):
    t = torch.linspace(*schedule.t_range, 1001)
    single = prediction.coefficients(schedule, schedule.level(t))
    double = prediction.coefficients(schedule, schedule.level(t.double()))
    assert {c.dtype for c in single} == {torch.float32}
    for name, a, b in zip(single._fields, single, double, strict=True):
        tiny = 1e-6 if name in ("skip", "noise") else 0  # those may be 0
        assert_close(a.double(), b, rtol=1e-3, atol=tiny, msg=lambda text, name=name: f"{name}: {text}")


def velocity(noisy):
    """Of the variance-preserving process x_t / sqrt(alpha^2 + sigma^2) (Salimans and Ho 2022, section 4)."""
    root = (noisy.alpha**2 + noisy.sigma**2).sqrt()
    return (noisy.alpha / root) * noisy.eps - (noisy.sigma / root) * noisy.x_0


def posterior_mean(noisy):
    s = noisy.schedule.level((noisy.t - 1 / 1000).clamp(min=0))
    x_0, x_t = noisy.x_0.flatten(1), noisy.x_t.flatten(1)
    mean, _ = forward_posterior(x_0, x_t, noisy.level.alpha, noisy.level.sigma, s.alpha, s.sigma)
    return mean.view_as(noisy.x_0)


def preconditioned(noisy):
    """Karras et al. 2022, eq. 8 and table 1, in their letters: x = x_0 + sigma n."""
    alpha = noisy.alpha.clamp(min=1e-12)  # without signal, the limit
    sigma, sigma_data, x = noisy.sigma / alpha, 0.5, noisy.x_t / alpha
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma_data**2 + sigma**2).sqrt()
    return (noisy.x_0 - c_skip * x) / c_out


TARGETS = {
    "edm": preconditioned,
    "epsilon": lambda noisy: noisy.eps,
    "flow": lambda noisy: noisy.eps - noisy.x_0,
    "posterior_mean": posterior_mean,
    "score": lambda noisy: -noisy.eps / noisy.sigma,
    "v": velocity,
    "x_0": lambda noisy: noisy.x_0,
}


@pytest.mark.parametrize("name", names("prediction"))
def test_target_is_what_the_name_says(name):
    for schedule in SCHEDULES.values():
        if serves(PREDICTIONS[name], schedule):
            noisy = Noisy(schedule)
            assert_close(noisy.target(PREDICTIONS[name]), TARGETS[name](noisy), rtol=1e-7, atol=1e-7)


@every_schedule
def test_v_is_the_plain_one_where_the_variance_is_preserved(schedule):
    if schedule.variance_preserving:
        noisy = Noisy(schedule)
        plain = noisy.alpha * noisy.eps - noisy.sigma * noisy.x_0
        assert_close(noisy.target(PREDICTIONS["v"]), plain, rtol=1e-7, atol=1e-7)


def test_flow_is_the_velocity_of_rectified_flow():
    noisy = Noisy(SCHEDULES["rectified_flow"])
    h = 1e-6
    ahead, behind = (noisy.schedule.level(noisy.t + step) for step in (h, -h))
    a, b = (expand(v.alpha, noisy.x_0) * noisy.x_0 + expand(v.sigma, noisy.x_0) * noisy.eps for v in (ahead, behind))
    assert_close(noisy.target(PREDICTIONS["flow"]), (a - b) / (2 * h), rtol=1e-6, atol=1e-6)


@every_data
def test_targets_average_to_the_score_and_its_kin(data):
    """At the exact estimate, F is the oracle's score, and the epsilon that belongs to it: Tweedie's formula."""
    level = Level(*(torch.full((50,), v, dtype=torch.float64) for v in (0.5, 0.6, 0.8)))
    x_t = data.sample_t(50, level.alpha, level.sigma, torch.Generator().manual_seed(0))
    x_0_hat, score = (f(x_t, level.alpha, level.sigma) for f in (data.denoise, data.score))
    for prediction, expected in ((Score(), score), (Epsilon(), -0.8 * score)):
        c = prediction.coefficients(SCHEDULES["cosine"], level)
        assert_close(prediction.target(x_0_hat, x_t, c), expected, rtol=1e-8, atol=1e-8)


@every_pair
@every_data
def test_denoiser_of_the_exact_network_is_exact_at_every_time(prediction, schedule, data):
    generator = torch.Generator().manual_seed(0)
    for level in levels(schedule, torch.linspace(*schedule.t_range, 9, dtype=torch.float64)):
        alpha, sigma = (torch.full((8,), v, dtype=torch.float64) for v in level[1:])
        x_t = data.sample_t(8, alpha, sigma, generator)
        network = ExactNetwork(data, schedule, prediction)
        if level.log_snr < -MAX_LOG_SNR:  # without signal, c_noise cannot say how little there is
            c = prediction.coefficients(schedule, Level(torch.full_like(alpha, level.t), alpha, sigma))
            target = prediction.target(data.denoise(x_t, alpha, sigma), x_t, c)
            network = lambda x, *_, target=target: target  # noqa: E731
        x_0_hat = NetworkDenoiser(network, lambda c: c, schedule, prediction)(x_t, level, None).x_0_hat
        assert_close(x_0_hat, data.denoise(x_t, alpha, sigma), rtol=0, atol=1e-7)


def test_epsilon_and_score_alone_are_refused_and_only_where_there_is_no_signal():
    refused = {(p, s) for p in PREDICTIONS for s in SCHEDULES if not serves(PREDICTIONS[p], SCHEDULES[s])}
    no_signal = {s for s in SCHEDULES if SCHEDULES[s].alpha(torch.tensor(SCHEDULES[s].t_range).double())[1] == 0}
    assert "zero_terminal_snr" in no_signal
    assert refused == {(p, s) for p in ("epsilon", "score") for s in no_signal}


@pytest.mark.parametrize("prediction", [Epsilon(), Score()], ids=str)
def test_refusal_names_both_and_what_would_do(prediction):
    with pytest.raises(ValueError, match=rf"{type(prediction).__name__} .*ZeroTerminalSNR.*prediction=v"):
        prediction.check(SCHEDULES["zero_terminal_snr"])


@every_prediction
def test_c_noise_is_finite_where_signal_or_noise_vanishes(prediction):
    ends = torch.tensor([0.0, 1e-30, 1.0], dtype=torch.float64)
    schedule = SCHEDULES["zero_terminal_snr"]
    noise = prediction.coefficients(schedule, schedule.level(ends)).noise
    assert noise.isfinite().all()
    assert noise.abs().max() <= MAX_LOG_SNR / 4


@every_pair
def test_c_noise_tells_the_noise_level(prediction, schedule):
    level = schedule.level(torch.linspace(*schedule.t_range, 1001, dtype=torch.float64))
    log_snr = (2 * (level.alpha / level.sigma).log()).clamp(-MAX_LOG_SNR, MAX_LOG_SNR)
    factor = -1 / 8 if isinstance(prediction, EDM) else 1 / 4
    noise = prediction.coefficients(schedule, level).noise
    assert_close(noise, factor * log_snr, rtol=1e-9, atol=1e-9)
    assert (noise.diff() * factor < 0).all()  # no two levels of training look the same


def test_coefficients_of_edm_are_table_1_on_its_own_schedule():
    sigma = torch.logspace(-2, 1, 20, dtype=torch.float64)  # Karras et al. 2022, table 1, "Ours"
    schedule = SCHEDULES["edm"]
    c = PREDICTIONS["edm"].coefficients(schedule, schedule.level(schedule.t_of_log_snr(-2 * sigma.log())))
    assert_close(c.skip, 0.25 / (sigma**2 + 0.25), rtol=1e-9, atol=0)
    assert_close(c.out, sigma * 0.5 / (0.25 + sigma**2).sqrt(), rtol=1e-9, atol=0)
    assert_close(c.into, 1 / (sigma**2 + 0.25).sqrt(), rtol=1e-9, atol=0)
    assert_close(c.noise, sigma.log() / 4, rtol=1e-9, atol=1e-12)


@every_schedule
@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_edm_has_inputs_and_targets_of_unit_variance_and_the_least_amplification(schedule, sigma_data):
    level = schedule.level(torch.linspace(*schedule.t_range, 33, dtype=torch.float64))
    prediction, one = EDM(sigma_data), torch.ones(33, 1, dtype=torch.float64)
    c = prediction.coefficients(schedule, level)
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    variance_in = c.into[:, None] ** 2 * ((alpha * sigma_data) ** 2 + sigma**2)
    of_x_0 = prediction.target(one, alpha, c)  # of x_0 = 1 without noise: the target is linear in x_0 and eps
    of_eps = prediction.target(0 * one, sigma, c)
    variance_of_target = (of_x_0 * sigma_data) ** 2 + of_eps**2
    covariance_with_x_t = of_x_0 * alpha * sigma_data**2 + of_eps * sigma  # 0: c_skip makes c_out least (eq. 124-131)
    assert_close(variance_in, one, rtol=1e-9, atol=0)
    assert_close(variance_of_target, one, rtol=1e-6, atol=0)
    assert_close(covariance_with_x_t / sigma, 0 * one, rtol=0, atol=1e-6)


@every_pair
def test_estimate_keeps_the_dtype_of_x_t_whatever_the_network_computes_in(prediction, schedule):
    level = levels(schedule, [sum(schedule.t_range) / 2])[0]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        denoise = NetworkDenoiser(lambda x, *_, d=dtype: x.to(d), lambda c: c, schedule, prediction)
        for x_t in (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4, dtype=torch.float64)):
            estimate = denoise(x_t, level, None).x_0_hat
            assert estimate.dtype == x_t.dtype
            assert estimate.isfinite().all()


def test_parameters_without_sense_are_refused():
    with pytest.raises(ValueError, match="num_timesteps"):
        PosteriorMean(0)
    for sigma_data in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma_data"):
            EDM(sigma_data)
