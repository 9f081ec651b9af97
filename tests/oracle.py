"""Closed-form truth for diffusion tests: Gaussian-mixture data under x_t = alpha * x_0 + sigma * eps.

No schedule lives here: alpha and sigma are arguments, 0-dim or (B,), and every result is float64.
Component k of the data is N(m_k, S_k), so x_t given k is N(alpha m_k, C_k) with C_k = alpha^2 S_k + sigma^2 I. Both
have the eigenvectors V_k, and C_k has the eigenvalues alpha^2 s_k + sigma^2: nothing is factored for each x_t.
Internal shapes are (K, B, D). All of it is finite for sigma > 0, point masses (S_k = 0) included.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mixture:
    """p(x_0) = sum_k weights_k N(means_k, covariances_k); shapes (K,), (K, D), (K, D, D)."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def __post_init__(self):
        for name in ("weights", "means", "covariances"):
            object.__setattr__(self, name, _float64(getattr(self, name)))
        count, dim = self.means.shape
        shapes_agree = self.weights.shape == (count,) and self.covariances.shape == (count, dim, dim)
        if not shapes_agree or not math.isclose(self.weights.sum(), 1, abs_tol=1e-6):
            raise ValueError("expected weights (K,) that sum to 1, means (K, D), covariances (K, D, D)")

    @classmethod
    def gaussian(cls, mean, covariance):
        """N(mean (D,), covariance (D, D)) as a mixture of one component."""
        mean, covariance = _float64(mean), _float64(covariance)
        return cls(mean.new_ones(1), mean[None], covariance[None])

    def conditional(self, k):
        """p(x_0 | component = k), the Gaussian behind an exact class-conditional denoiser."""
        return Mixture.gaussian(self.means[k], self.covariances[k])

    def sample(self, n, generator=None):
        """x_0 (n, D) and component (n,), by ancestral sampling; S_k^(1/2) by eigh, so S_k may be singular."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        values, vectors = self._eigen
        root = vectors * values.sqrt()
        x_0 = _noise_like(self.means[component], generator)
        for k in range(len(self.means)):
            x_0[component == k] = self.means[k] + x_0[component == k] @ root[k].T
        return x_0, component

    def sample_t(self, n, alpha, sigma, generator=None):
        """x_t = alpha x_0 + sigma eps, (n, D); alpha and sigma 0-dim or (n,)."""
        x_0, _ = self.sample(n, generator)
        return _trailing(alpha, 1) * x_0 + _trailing(sigma, 1) * _noise_like(x_0, generator)

    def mean(self):
        """E[x_0], (D,)."""
        return self.weights @ self.means

    def covariance(self):
        """Cov[x_0], (D, D), by the law of total covariance."""
        centred = self.means - self.mean()
        return torch.einsum("k,kij->ij", self.weights, self.covariances + centred[:, :, None] * centred[:, None, :])

    def mean_t(self, alpha, sigma):
        """E[x_t] = alpha E[x_0], (D,) or (B, D); sigma is unused, as the noise has mean zero."""
        return _trailing(alpha, 1) * self.mean()

    def covariance_t(self, alpha, sigma):
        """Cov[x_t] = alpha^2 Cov[x_0] + sigma^2 I, (D, D) or (B, D, D)."""
        return _diffused(self.covariance(), _trailing(alpha, 2), _trailing(sigma, 2))

    @cached_property
    def _eigen(self):
        """Eigenvalues s_k of S_k (K, 1, D), and eigenvectors V_k as columns (K, D, D)."""
        values, vectors = torch.linalg.eigh(self.covariances)
        return values.clamp(min=0)[:, None], vectors

    def _along_eigenvectors(self, x_t, alpha, sigma):
        """z_k = V_k^T (x_t - alpha m_k) (K, B, D), and its variances alpha^2 s_k + sigma^2 (K, 1 or B, D)."""
        values, vectors = self._eigen
        alpha, sigma = _trailing(alpha, 1), _trailing(sigma, 1)
        return (x_t - alpha * self.means[:, None]) @ vectors, alpha**2 * values + sigma**2

    def log_joint(self, x_t, alpha, sigma):
        """log p(component, x_t) = log w_k + log N(x_t; alpha m_k, C_k), (B, K)."""
        return self._log_joint(*self._along_eigenvectors(x_t, alpha, sigma)).T

    def _log_joint(self, z, variances):
        normaliser = z.shape[-1] * math.log(2 * math.pi)
        squares = (z**2 / variances + variances.log()).sum(-1)
        return self.weights.log()[:, None] - 0.5 * (squares + normaliser)

    def log_density(self, x_t, alpha, sigma):
        """log p(x_t) = logsumexp_k log p(k, x_t), (B,)."""
        return self.log_joint(x_t, alpha, sigma).logsumexp(-1)

    def responsibilities(self, x_t, alpha, sigma):
        """p(component | x_t), (B, K), by Bayes' rule: the exact noisy classifier."""
        return self.log_joint(x_t, alpha, sigma).softmax(-1)

    def component_scores(self, x_t, alpha, sigma):
        """grad log p(x_t | k) = -C_k^-1 (x_t - alpha m_k), (B, K, D)."""
        return self._scores(*self._along_eigenvectors(x_t, alpha, sigma)).transpose(0, 1)

    def _scores(self, z, variances):
        return -(z / variances) @ self._eigen[1].mT

    def score(self, x_t, alpha, sigma):
        """grad log p(x_t) = sum_k p(k | x_t) grad log p(x_t | k), (B, D)."""
        z, variances = self._along_eigenvectors(x_t, alpha, sigma)
        return (self._log_joint(z, variances).softmax(0)[..., None] * self._scores(z, variances)).sum(0)

    def classifier_score(self, x_t, alpha, sigma):
        """grad_{x_t} log p(k | x_t) = grad log p(x_t | k) - grad log p(x_t), (B, K, D): Bayes' rule."""
        return self.component_scores(x_t, alpha, sigma) - self.score(x_t, alpha, sigma)[:, None, :]

    def _component_means(self, z, variances, alpha):
        """E[x_0 | x_t, k] = m_k + alpha S_k C_k^-1 (x_t - alpha m_k), (K, B, D): Gaussian conditioning."""
        values, vectors = self._eigen
        return self.means[:, None] + _trailing(alpha, 1) * ((values / variances * z) @ vectors.mT)

    def denoise(self, x_t, alpha, sigma):
        """x_0_hat = E[x_0 | x_t] = sum_k p(k | x_t) E[x_0 | x_t, k], (B, D): Bayes' rule, not Tweedie's formula."""
        z, variances = self._along_eigenvectors(x_t, alpha, sigma)
        means = self._component_means(z, variances, alpha)
        if len(means) == 1:
            return means[0]
        return (self._log_joint(z, variances).softmax(0)[..., None] * means).sum(0)

    def posterior_covariance(self, x_t, alpha, sigma):
        """Cov[x_0 | x_t], (B, D, D), by total covariance over k; Cov[x_0 | x_t, k] is free of x_t.

        S - alpha^2 S C^-1 S = sigma^2 C^-1 S (Gaussian conditioning); the right side has no cancellation.
        """
        values, vectors = self._eigen
        z, variances = self._along_eigenvectors(x_t, alpha, sigma)
        within = _trailing(sigma, 1) ** 2 * values / variances
        within = (vectors[:, None] * within[:, :, None]) @ vectors.mT[:, None]
        means, weights = self._component_means(z, variances, alpha), self._log_joint(z, variances).softmax(0)
        centred = means - (weights[..., None] * means).sum(0)
        between = centred[..., :, None] * centred[..., None, :]
        return (weights[..., None, None] * (within + between)).sum(0)

    def optimal_variance(self, alpha_s, sigma_s, alpha_t, sigma_t, n=10_000, generator=None, lambda_squared=None):
        """Optimal isotropic variance of p(x_s | x_t), 0-dim: Analytic-DPM (Bao et al. 2022), Theorem 1.

        q(x_s | x_t, x_0) has variance lambda^2 I and mean alpha_s x_0 + sqrt(sigma_s^2 - lambda^2) eps, where
        eps = (x_t - alpha_t x_0) / sigma_t. By total variance sigma*^2 = lambda^2 + c^2 E[tr Cov(x_0 | x_t)] / D,
        with c the coefficient of x_0; E[tr Cov] / D = (sigma_t / alpha_t)^2 (1 - sigma_t^2 E|score|^2 / D) there.
        lambda_squared: None for DDPM (the forward posterior's variance), 0 for DDIM. Noise levels are 0-dim.
        Exact for one component, otherwise Monte Carlo over n samples of x_t; memory grows as n K D^2.
        """
        alpha_s, sigma_s, alpha_t, sigma_t = map(_float64, (alpha_s, sigma_s, alpha_t, sigma_t))
        ancestral = sigma_s**2 * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
        lambda_squared = ancestral if lambda_squared is None else _float64(lambda_squared)
        x_t = self.means if len(self.weights) == 1 else self.sample_t(n, alpha_t, sigma_t, generator)
        covariance = self.posterior_covariance(x_t, alpha_t, sigma_t)
        coefficient = alpha_s - (sigma_s**2 - lambda_squared).sqrt() * alpha_t / sigma_t
        return lambda_squared + coefficient**2 * covariance.diagonal(dim1=-2, dim2=-1).mean()

    def probability_flow(self, x_t, alpha_t, sigma_t, alpha_s, sigma_s):
        """Exact map x_t -> x_s (B, D) of the probability-flow ODE (Song et al. 2021, eq. 13); one Gaussian only.

        Along an eigenvector of S, v = alpha^2 s + sigma^2 obeys dv/dt = 2 f v + g^2 and the ODE reads
        dz/dt = (f + g^2 / 2v) z for z = x - mean, so z / sqrt(v) is constant.
        """
        if len(self.weights) != 1:
            raise ValueError("the probability flow has a closed form for one Gaussian only")
        values, vectors = (part[0] for part in self._eigen)
        var_t = _trailing(alpha_t, 1) ** 2 * values + _trailing(sigma_t, 1) ** 2
        var_s = _trailing(alpha_s, 1) ** 2 * values + _trailing(sigma_s, 1) ** 2
        z = (x_t - self.mean_t(alpha_t, sigma_t)) @ vectors
        return self.mean_t(alpha_s, sigma_s) + (z * (var_s / var_t).sqrt()) @ vectors.T


def forward_posterior(x_0, x_t, alpha_t, sigma_t, alpha_s, sigma_s):
    """Mean and per-entry variance of q(x_s | x_t, x_0), both (B, D), by conditioning the joint of (x_s, x_t).

    Given x_0: x_s = alpha_s x_0 + sigma_s eps and x_t = a x_s + noise, a = alpha_t / alpha_s, noise of variance
    sigma_t^2 - a^2 sigma_s^2. Source: Gaussian conditioning (Bishop 2006, eqs. 2.81-2.82), entry by entry.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = (_trailing(value, 1) for value in (alpha_t, sigma_t, alpha_s, sigma_s))
    a = alpha_t / alpha_s
    noise = sigma_t**2 - a**2 * sigma_s**2
    joint = ((sigma_s**2, a * sigma_s**2), (a * sigma_s**2, a**2 * sigma_s**2 + noise))
    gain = joint[0][1] / joint[1][1]
    mean = alpha_s * x_0 + gain * (x_t - a * (alpha_s * x_0))
    return mean, (joint[0][0] - gain * joint[1][0]).expand_as(mean)


def gaussian_kl(mean_1, var_1, mean_2, var_2):
    """KL(N(mean_1, var_1) || N(mean_2, var_2)) of diagonal Gaussians, summed over the last dim: (B, D) -> (B,)."""
    ratio = _float64(var_1) / _float64(var_2)
    return 0.5 * (ratio - 1 - ratio.log() + (mean_1 - mean_2) ** 2 / var_2).sum(-1)


def _float64(value):
    return torch.as_tensor(value, dtype=torch.float64)


def _noise_like(x, generator):
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _trailing(value, n):
    """Append n singleton dims, so that a 0-dim or (B,) noise level broadcasts against n trailing dims."""
    return _float64(value)[(...,) + (None,) * n]


def _diffused(covariance, alpha, sigma):
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return alpha**2 * covariance + sigma**2 * eye
