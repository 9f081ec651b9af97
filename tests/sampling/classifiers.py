"""Exact and meaningless classifiers and encoders, in memory and in files, for the tests of guidance by gradients."""

from dataclasses import dataclass
from itertools import count

import torch
from cases import each
from exact import MIXTURE, ExactDenoiser
from options import built
from torch import Tensor, nn

from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.variances import Estimate
from diffusion_trainer.sampling.gradient_guidance import (
    GradientGuidance,
    log_probability,
)

every_schedule = each("schedule", built("schedule"))
EXACT = ExactDenoiser(MIXTURE)
NOISY = Level(0.5, 0.8, 0.6)
CONDITION = torch.arange(40) % 2


def at(level):
    return torch.tensor(level.alpha, dtype=torch.float64), torch.tensor(level.sigma, dtype=torch.float64)


def noisy(level=NOISY, seed=0):
    """x_t (40, 2)"""
    return MIXTURE.sample_t(40, *at(level), torch.Generator().manual_seed(seed))


class Marginal(ExactDenoiser):
    """Never listens to the condition, as a model that was trained without one; has a second output."""

    def __call__(self, x_t, level, condition):
        return Estimate(super().__call__(x_t, level, None).x_0_hat, condition)


@dataclass(frozen=True)
class Bayes(GradientGuidance):
    """p(component | x_t) of the mixture: the perfect classifier of noisy samples."""

    @property
    def looks_at_x_0_hat(self):
        return False

    def log_potential(self, x_t, x_0_hat, level, condition):
        return log_probability(MIXTURE.log_joint(x_t, *at(level)), condition, "Bayes")


@dataclass(frozen=True)
class CleanBayes(GradientGuidance):
    """p(component | x_0 = x_0_hat)"""

    @property
    def looks_at_x_0_hat(self):
        return True

    def log_potential(self, x_t, x_0_hat, level, condition):
        return log_probability(CLEAN(x_0_hat), condition, "CleanBayes")


class NoisyClassifier(nn.Module):
    """Bayes' in a file: x_t (B, 2), log_snr (B,) of a variance-preserving schedule -> features, logits (B, 2)."""

    def __init__(self):
        super().__init__()
        for name in ("weights", "means", "covariances"):
            self.register_buffer(name, getattr(MIXTURE, name))

    def forward(self, x_t: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        alpha, variance = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid()
        residual = x_t[:, None] - alpha[:, None, None] * self.means
        eye = torch.eye(2, dtype=x_t.dtype)
        covariance = (alpha**2)[:, None, None, None] * self.covariances + variance[:, None, None, None] * eye
        solved = torch.linalg.solve(covariance, residual.unsqueeze(-1)).squeeze(-1)
        log_det = torch.linalg.slogdet(covariance)[1]
        return x_t, self.weights.log() - 0.5 * (residual * solved).sum(-1) - 0.5 * log_det


class Net(nn.Module):
    """A smooth one, float64: (B, inputs numbers in all) -> (B, outputs), scores of no meaning; has dropout."""

    def __init__(self, inputs, outputs, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(inputs, 8, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(8, outputs, generator=generator, dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(x.flatten(1) @ self.first)) @ self.second


class FeaturesThenLogits(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.tanh(x.flatten(1) @ self.first)
        return features, features @ self.second


class KnowsNoise(Net):
    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.first + log_snr[:, None]) @ self.second


CLEAN = Net(2, 2).eval()
FILES = count()  # loaded files are remembered by path: each test has its own


def scripting(folder):
    """scripted(module) -> path of its TorchScript file."""

    def save(module):
        path = folder / f"{next(FILES)}.pt"
        torch.jit.save(torch.jit.script(module), str(path))
        return str(path)

    return save


def gradient_of(guidance, x_t, condition, level=NOISY, denoiser=EXACT):
    """What it adds to x_0_hat, as grad log h."""
    added = guidance(denoiser)(x_t, level, condition).x_0_hat - denoiser(x_t, level, condition).x_0_hat
    return added * level.alpha / (guidance.scale * level.sigma**2)


def finite_difference(log_h, x_t, step=1e-6):
    columns = [(log_h(x_t + step * e) - log_h(x_t - step * e)) / (2 * step) for e in torch.eye(2, dtype=x_t.dtype)]
    return torch.stack(columns, 1)


def through_the_denoiser(gradient, x_t, level=NOISY):
    """d x_0_hat / d x_t = (alpha / sigma^2) Cov[x_0 | x_t], symmetric: the chain rule without autograd."""
    covariance = MIXTURE.posterior_covariance(x_t, *at(level))
    return level.alpha / level.sigma**2 * torch.einsum("bij,bj->bi", covariance, gradient)


@dataclass(frozen=True)
class Image(Denoiser):
    """(B, C, H, W); listens to the condition."""

    def __call__(self, x_t, level, condition):
        return Estimate(0.5 * x_t if condition is None else 0.5 * x_t + 0.1 * condition[:, None, None, None])

    def null(self, condition):
        return torch.full_like(condition, 2)
