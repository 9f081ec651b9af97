"""The oracle against truths it does not use: torch.distributions, autograd, quadrature, integration, sampling."""

import math

import numpy as np
import pytest
import torch
from oracle import Mixture, forward_posterior, gaussian_kl
from scipy.integrate import quad
from torch.autograd.functional import hessian, jacobian
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

NOISE_LEVELS = [(0.95, math.sqrt(1 - 0.95**2)), (0.3, math.sqrt(1 - 0.3**2)), (1.0, 2.0)]
NOISE_LEVELS = [tuple(torch.tensor(value, dtype=torch.float64) for value in level) for level in NOISE_LEVELS]
# s is less noisy than t
ALPHA_S, SIGMA_S, ALPHA_T, SIGMA_T = (torch.tensor(v, dtype=torch.float64) for v in (0.8, 0.6, 0.5, math.sqrt(0.75)))
PAIR = (ALPHA_S, SIGMA_S, ALPHA_T, SIGMA_T)

levels = pytest.mark.parametrize(("alpha", "sigma"), NOISE_LEVELS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def random_mixture(count=3, dim=2):
    factors = 0.5 * randn(count, dim, dim, seed=1)
    weights = torch.arange(1.0, count + 1, dtype=torch.float64)
    covariances = factors @ factors.mT + 0.02 * torch.eye(dim, dtype=torch.float64)
    return Mixture(weights / weights.sum(), 1.5 * randn(count, dim, seed=2), covariances)


def random_gaussian(dim=3):
    return random_mixture(2, dim).conditional(1)


def gradient(function, x_t):
    x_t = x_t.clone().requires_grad_()
    return torch.autograd.grad(function(x_t).sum(), x_t)[0]


def normal_pdf(x, mean, deviation):
    return np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))


def torch_components(mixture, alpha, sigma):
    """p(x_t | k) from the definition of x_t, as torch.distributions sees it."""
    eye = torch.eye(mixture.means.shape[1], dtype=torch.float64)
    return MultivariateNormal(alpha * mixture.means, alpha**2 * mixture.covariances + sigma**2 * eye)


# --- the data and x_t ---------------------------------------------------------------------------------------------


def test_samples_have_the_stated_moments_and_component_frequencies():
    mixture, n = random_mixture(), 100_000
    x_0, component = mixture.sample(n, seeded())
    assert (x_0.shape, component.shape, x_0.dtype) == ((n, 2), (n,), torch.float64)
    assert_close(component.bincount().double() / n, mixture.weights, atol=0.008, rtol=0)
    assert_close(x_0.mean(0), mixture.mean(), atol=0.02, rtol=0)
    assert_close(x_0.T.cov(), mixture.covariance(), atol=0.04, rtol=0)
    for k in range(3):
        assert_close(x_0[component == k].mean(0), mixture.means[k], atol=0.03, rtol=0)
        assert_close(x_0[component == k].T.cov(), mixture.covariances[k], atol=0.03, rtol=0)


@levels
def test_moments_of_x_t_match_noised_samples(alpha, sigma):
    mixture, n = random_mixture(), 200_000
    x_t = mixture.sample_t(n, alpha, sigma, seeded())
    assert_close(x_t.mean(0), mixture.mean_t(alpha, sigma), atol=0.025, rtol=0)
    assert_close(x_t.T.cov(), mixture.covariance_t(alpha, sigma), atol=0.02, rtol=0.02)


def test_conditional_is_the_named_component():
    mixture = random_mixture()
    assert_close(mixture.conditional(1).mean(), mixture.means[1])
    assert_close(mixture.conditional(1).covariance(), mixture.covariances[1])


@pytest.mark.parametrize(("weights", "dim"), [([0.5, 0.4], 2), ([1.0], 2), ([0.5, 0.5], 3)])
def test_inconsistent_parameters_are_refused(weights, dim):
    with pytest.raises(ValueError, match="sum to 1"):
        Mixture(weights, torch.zeros(2, 2), torch.eye(dim).expand(2, dim, dim))


# --- densities and gradients --------------------------------------------------------------------------------------


@levels
def test_log_density_matches_torch_distributions(alpha, sigma):
    mixture, x_t = random_mixture(), 2 * randn(50, 2)
    truth = MixtureSameFamily(Categorical(mixture.weights), torch_components(mixture, alpha, sigma))
    assert_close(mixture.log_density(x_t, alpha, sigma), truth.log_prob(x_t))


@levels
def test_score_is_the_gradient_of_the_log_density(alpha, sigma):
    mixture, x_t = random_mixture(), 2 * randn(50, 2)
    truth = gradient(lambda x: mixture.log_density(x, alpha, sigma), x_t)
    assert_close(mixture.score(x_t, alpha, sigma), truth)


@levels
def test_responsibilities_are_bayes_rule_over_components(alpha, sigma):
    mixture, x_t = random_mixture(), 2 * randn(50, 2)
    joint = mixture.weights * torch_components(mixture, alpha, sigma).log_prob(x_t[:, None]).exp()
    assert_close(mixture.responsibilities(x_t, alpha, sigma), joint / joint.sum(-1, keepdim=True))


@levels
@pytest.mark.parametrize("k", range(3))
def test_classifier_score_is_the_gradient_of_the_log_responsibility(alpha, sigma, k):
    mixture, x_t = random_mixture(), 2 * randn(50, 2)
    truth = gradient(lambda x: mixture.responsibilities(x, alpha, sigma)[:, k].log(), x_t)
    assert_close(mixture.classifier_score(x_t, alpha, sigma)[:, k], truth)


# --- the posterior of x_0 -----------------------------------------------------------------------------------------


@levels
@pytest.mark.parametrize("x_t", [-1.3, 0.1, 2.0])
def test_posterior_moments_match_quadrature_of_bayes_rule(alpha, sigma, x_t):
    weights, means, deviations = np.array([0.3, 0.7]), np.array([-1.0, 1.2]), np.array([0.4, 0.25])
    mixture = Mixture(weights, means[:, None], deviations[:, None, None] ** 2)

    def moment(power):
        def integrand(x_0):
            prior = weights @ normal_pdf(x_0, means, deviations)
            return x_0**power * prior * normal_pdf(x_t, float(alpha) * x_0, float(sigma))

        return quad(integrand, -5, 5, points=[*means, 0], epsabs=1e-13, epsrel=1e-9)[0]

    evidence = moment(0)
    mean = moment(1) / evidence
    args = torch.tensor([[x_t]], dtype=torch.float64), alpha, sigma
    assert mixture.log_density(*args).item() == pytest.approx(math.log(evidence), abs=1e-7)
    assert mixture.denoise(*args).item() == pytest.approx(mean, rel=1e-6)
    assert mixture.posterior_covariance(*args).item() == pytest.approx(moment(2) / evidence - mean**2, rel=1e-6)


@levels
def test_denoise_is_tweedies_formula(alpha, sigma):
    mixture, x_t = random_mixture(), 2 * randn(50, 2)
    truth = (x_t + sigma**2 * mixture.score(x_t, alpha, sigma)) / alpha
    assert_close(mixture.denoise(x_t, alpha, sigma), truth)


@levels
def test_denoise_averages_the_class_conditional_denoisers(alpha, sigma):
    mixture, x_t = random_mixture(), 2 * randn(50, 2)
    conditional = torch.stack([mixture.conditional(k).denoise(x_t, alpha, sigma) for k in range(3)], 1)
    truth = (mixture.responsibilities(x_t, alpha, sigma)[..., None] * conditional).sum(1)
    assert_close(mixture.denoise(x_t, alpha, sigma), truth)


@levels
def test_posterior_covariance_is_the_hessian_and_the_jacobian_identity(alpha, sigma):
    mixture, eye = random_mixture(), torch.eye(2, dtype=torch.float64)
    for x_t in 2 * randn(4, 1, 2):
        covariance = mixture.posterior_covariance(x_t, alpha, sigma)[0]
        second = hessian(lambda x: mixture.log_density(x, alpha, sigma).sum(), x_t)[0, :, 0, :]
        first = jacobian(lambda x: mixture.denoise(x, alpha, sigma), x_t)[0, :, 0, :]
        assert_close(covariance, sigma**2 / alpha**2 * (eye + sigma**2 * second))
        assert_close(covariance, sigma**2 / alpha * first)


# --- numerics and shapes ------------------------------------------------------------------------------------------


def test_point_masses_far_away_at_small_noise_stay_finite():
    """Two points at +-1: x_0_hat = tanh(alpha x_t / sigma^2)."""
    mixture = Mixture([0.5, 0.5], [[-1.0], [1.0]], torch.zeros(2, 1, 1))
    alpha, sigma = torch.tensor(1.0), torch.tensor(1e-3)
    x_t = torch.tensor([[-1e3], [1e-7], [0.0], [1e3]], dtype=torch.float64)
    truth = torch.tanh(x_t / sigma.double() ** 2)
    assert_close(mixture.denoise(x_t, alpha, sigma), truth)
    assert_close(mixture.posterior_covariance(x_t, alpha, sigma)[:, 0], 1 - truth**2)
    assert mixture.score(x_t, alpha, sigma).isfinite().all()
    assert mixture.log_density(x_t, alpha, sigma).isfinite().all()


METHODS = {
    "mean_t": (2,),
    "covariance_t": (2, 2),
    "log_density": (),
    "score": (2,),
    "responsibilities": (3,),
    "classifier_score": (3, 2),
    "denoise": (2,),
    "posterior_covariance": (2, 2),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_noise_levels_is_each_level_in_turn(name):
    mixture, x_t = random_mixture(), 2 * randn(3, 2)
    alphas, sigmas = (torch.stack(values) for values in zip(*NOISE_LEVELS, strict=True))
    takes_x_t = not name.endswith("_t")
    batch = getattr(mixture, name)(*([x_t] * takes_x_t), alphas, sigmas)
    assert (batch.shape, batch.dtype) == ((3, *METHODS[name]), torch.float64)
    for i, level in enumerate(NOISE_LEVELS):
        single = getattr(mixture, name)(*([x_t[i : i + 1]] * takes_x_t), *level)
        assert_close(batch[i], single[0] if takes_x_t else single)


def test_a_batch_of_noise_level_pairs_is_each_pair_in_turn():
    gaussian, x_0, x_t = random_gaussian(), randn(2, 3), randn(2, 3, seed=1)
    alpha_t, sigma_t, alpha_s, sigma_s = pairs = torch.tensor([[0.5, 0.3], [0.8, 0.9], [0.8, 0.6], [0.6, 0.7]]).double()
    flow = gaussian.probability_flow(x_t, alpha_t, sigma_t, alpha_s, sigma_s)
    mean, variance = forward_posterior(x_0, x_t, alpha_t, sigma_t, alpha_s, sigma_s)
    for i in range(2):
        one = slice(i, i + 1)
        assert_close(flow[one], gaussian.probability_flow(x_t[one], *pairs[:, i]))
        assert_close((mean[one], variance[one]), forward_posterior(x_0[one], x_t[one], *pairs[:, i]))


# --- the reverse process ------------------------------------------------------------------------------------------


def test_probability_flow_turns_samples_of_p_t_into_samples_of_p_s():
    """The map is affine, x_s = A x_t + b, so its moments are exact: A Cov_t A^T = Cov_s."""
    gaussian, back = random_gaussian(), (ALPHA_T, SIGMA_T, ALPHA_S, SIGMA_S)
    b = gaussian.probability_flow(torch.zeros(1, 3), *back)
    a = (gaussian.probability_flow(torch.eye(3), *back) - b).T
    assert_close(a @ gaussian.covariance_t(ALPHA_T, SIGMA_T) @ a.T, gaussian.covariance_t(ALPHA_S, SIGMA_S))
    assert_close(a @ gaussian.mean_t(ALPHA_T, SIGMA_T) + b[0], gaussian.mean_t(ALPHA_S, SIGMA_S))


def test_probability_flow_matches_a_fine_integration_of_the_ode():
    """Cosine VP schedule, alpha = cos(pi t / 2): f = -(pi / 2) tan(pi t / 2), g^2 = -2 f (Song et al. 2021, eq. 13)."""
    gaussian, steps = random_gaussian(), 100
    start, end = 0.85, 0.1

    def level(t):
        angle = torch.tensor(math.pi / 2 * t, dtype=torch.float64)
        return angle.cos(), angle.sin()

    def velocity(x, t):
        f = -math.pi / 2 * math.tan(math.pi / 2 * t)
        score = gradient(torch_components(gaussian, *level(t)).log_prob, x)
        return f * x - 0.5 * (-2 * f) * score

    x, h = 2 * randn(5, 3), (end - start) / steps
    closed_form = gaussian.probability_flow(x, *level(start), *level(end))
    for t in np.linspace(start, end, steps, endpoint=False):
        k_1 = velocity(x, t)
        k_2 = velocity(x + h / 2 * k_1, t + h / 2)
        k_3 = velocity(x + h / 2 * k_2, t + h / 2)
        k_4 = velocity(x + h * k_3, t + h)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    assert_close(closed_form, x, atol=1e-6, rtol=1e-6)


def test_probability_flow_refuses_a_mixture():
    with pytest.raises(ValueError, match="one Gaussian only"):
        random_mixture().probability_flow(torch.zeros(1, 2), ALPHA_T, SIGMA_T, ALPHA_S, SIGMA_S)


def test_forward_posterior_is_ddpm_equation_7():
    betas = torch.linspace(1e-4, 0.3, 10, dtype=torch.float64)
    alphas_bar = (1 - betas).cumprod(0)
    x_0, x_t = randn(4, 3), randn(4, 3, seed=1)
    for t in range(1, 10):
        bar, bar_before, beta = alphas_bar[t], alphas_bar[t - 1], betas[t]
        truth_mean = bar_before.sqrt() * beta / (1 - bar) * x_0
        truth_mean = truth_mean + (1 - beta).sqrt() * (1 - bar_before) / (1 - bar) * x_t
        truth_variance = (1 - bar_before) / (1 - bar) * beta
        levels_ = bar.sqrt(), (1 - bar).sqrt(), bar_before.sqrt(), (1 - bar_before).sqrt()
        mean, variance = forward_posterior(x_0, x_t, *levels_)
        assert_close(mean, truth_mean)
        assert_close(variance, truth_variance.expand(4, 3))


def test_optimal_variance_of_a_gaussian_is_the_reverse_conditional_variance():
    """(x_s, x_t) is Gaussian, so the residual of regressing x_s on x_t has the true covariance of x_s given x_t."""
    gaussian, n = random_gaussian(), 100_000
    a = ALPHA_T / ALPHA_S
    x_s = ALPHA_S * gaussian.sample(n, seeded())[0] + SIGMA_S * randn(n, 3, seed=1)
    x_t = a * x_s + (SIGMA_T**2 - a**2 * SIGMA_S**2).sqrt() * randn(n, 3, seed=2)
    x_s, x_t = x_s - x_s.mean(0), x_t - x_t.mean(0)
    residual = x_s - x_t @ torch.linalg.lstsq(x_t, x_s).solution
    optimal = gaussian.optimal_variance(*PAIR)
    assert optimal.item() == pytest.approx(residual.square().mean().item(), rel=0.015)

    cov_s, cov_t = gaussian.covariance_t(ALPHA_S, SIGMA_S), gaussian.covariance_t(ALPHA_T, SIGMA_T)
    exact = cov_s - a**2 * cov_s @ torch.linalg.solve(cov_t, cov_s)
    assert_close(optimal, exact.trace() / 3)


def test_optimal_variance_of_a_mixture_is_the_mean_squared_reverse_error():
    """E|x_s - E[x_s | x_t]|^2 / D, where E[x_s | x_t] is the forward posterior's mean at x_0_hat.

    The components lie close to each other, so that Cov[x_0 | x_t] depends on x_t.
    """
    mixture, n = Mixture([0.4, 0.6], [[-1.0, 0.3], [1.0, -0.5]], 0.02 * torch.eye(2).expand(2, 2, 2)), 100_000
    a = ALPHA_T / ALPHA_S
    x_s = ALPHA_S * mixture.sample(n, seeded())[0] + SIGMA_S * randn(n, 2, seed=1)
    x_t = a * x_s + (SIGMA_T**2 - a**2 * SIGMA_S**2).sqrt() * randn(n, 2, seed=2)
    x_0_hat = mixture.denoise(x_t, ALPHA_T, SIGMA_T)
    residual = x_s - forward_posterior(x_0_hat, x_t, ALPHA_T, SIGMA_T, ALPHA_S, SIGMA_S)[0]
    optimal = mixture.optimal_variance(*PAIR, n=50_000, generator=seeded(3))
    assert optimal.item() == pytest.approx(residual.square().mean().item(), rel=0.015)


@pytest.mark.parametrize("ddim", [False, True])
def test_optimal_variance_is_analytic_dpm_theorem_1(ddim):
    """Bao et al. 2022 as printed, with abar = alpha^2, bbar = sigma^2 and the exact E|score|^2 = tr Cov_t^-1."""
    gaussian = random_gaussian()
    abar_n, bbar_n, bbar_before = ALPHA_T**2, SIGMA_T**2, SIGMA_S**2
    alpha_n = abar_n / ALPHA_S**2
    lambda_squared = 0 * bbar_n if ddim else bbar_before / bbar_n * (1 - alpha_n)
    squared_score = gaussian.covariance_t(ALPHA_T, SIGMA_T).inverse().trace()
    coefficient = (bbar_n / alpha_n).sqrt() - (bbar_before - lambda_squared).sqrt()
    truth = lambda_squared + coefficient**2 * (1 - bbar_n * squared_score / 3)
    assert_close(gaussian.optimal_variance(*PAIR, lambda_squared=0.0 if ddim else None), truth)


def test_gaussian_kl_matches_torch_distributions():
    mean_1, mean_2, var_1, var_2 = randn(4, 5, 3)
    var_1, var_2 = var_1.exp(), var_2.exp()
    truth = kl_divergence(Normal(mean_1, var_1.sqrt()), Normal(mean_2, var_2.sqrt())).sum(-1)
    assert_close(gaussian_kl(mean_1, var_1, mean_2, var_2), truth)


def test_in_three_dimensions_it_is_gaussian_conditioning_too():
    """Eigenvectors of two dimensions may be their own transpose; these are not."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    mixture = Mixture([0.4, 0.6], torch.randn(2, 3, generator=generator), root @ root.mT)
    x_t = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    alpha, sigma = torch.rand(5, generator=generator), torch.rand(5, generator=generator) + 0.1
    for a, s in ((alpha, sigma), (alpha[:1].squeeze(), sigma[:1].squeeze())):
        assert_close(mixture.log_density(x_t, a, s), torch.stack([
            MixtureSameFamily(Categorical(mixture.weights), torch_components(mixture, u, v)).log_prob(x)
            for x, u, v in zip(x_t, a.expand(5).double(), s.expand(5).double(), strict=True)
        ]))  # fmt: skip
        for k in range(2):
            given, S = mixture.conditional(k), mixture.covariances[k]
            for i, (u, v) in enumerate(zip(a.expand(5).double(), s.expand(5).double(), strict=True)):
                gain = u * S @ torch.linalg.inv(u**2 * S + v**2 * torch.eye(3))
                mean = mixture.means[k] + gain @ (x_t[i] - u * mixture.means[k])
                assert_close(given.denoise(x_t, a, s)[i], mean)
                assert_close(given.score(x_t, a, s)[i], (u * mean - x_t[i]) / v**2)
                assert_close(given.posterior_covariance(x_t, a, s)[i], S - u * gain @ S)
