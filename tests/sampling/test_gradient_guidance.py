"""Guidance by gradients: exact classifiers turn exact marginal denoisers into exact conditional ones."""

import numpy as np
import pytest
import torch
from cases import each
from exact import MIXTURE, ExactDenoiser
from sampling.classifiers import (
    CLEAN,
    CONDITION,
    EXACT,
    NOISY,
    Bayes,
    CleanBayes,
    FeaturesThenLogits,
    Marginal,
    Net,
    NoisyClassifier,
    at,
    every_schedule,
    finite_difference,
    gradient_of,
    noisy,
    scripting,
    through_the_denoiser,
)
from torch import Tensor, nn
from torch.testing import assert_close

from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.schedules import Cosine
from diffusion_trainer.process.variances import FixedSmall
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.gradient_guidance import (
    ClassifierGuidance,
    CleanClassifierGuidance,
    SimilarityGuidance,
)
from diffusion_trainer.sampling.grids import UniformLogSNR, UniformTime
from diffusion_trainer.sampling.guidance import ClassifierFree
from diffusion_trainer.sampling.sampler import Sampler


@pytest.fixture
def scripted(tmp_path):
    return scripting(tmp_path)


@every_schedule
def test_the_exact_classifier_turns_the_marginal_into_the_conditional_denoiser(schedule):
    for level in levels(schedule, [0.1, 0.5, 0.9]):
        x_t = noisy(level)
        guided = Bayes(1.0)(Marginal(MIXTURE))(x_t, level, CONDITION)
        assert_close(guided.x_0_hat, EXACT(x_t, level, CONDITION).x_0_hat, rtol=1e-8, atol=1e-8)
        assert torch.equal(guided.second, CONDITION)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_guided_score_adds_scale_times_the_classifiers_and_is_equation_9_19_for_eps(scale):
    x_t = noisy()
    guided = Bayes(scale)(Marginal(MIXTURE))(x_t, NOISY, CONDITION).x_0_hat
    classifier = MIXTURE.classifier_score(x_t, *at(NOISY))[torch.arange(40), CONDITION]
    score = (NOISY.alpha * guided - x_t) / NOISY.sigma**2  # Tweedie
    assert_close(score, MIXTURE.score(x_t, *at(NOISY)) + scale * classifier, rtol=1e-8, atol=1e-8)
    eps_hat = (x_t - NOISY.alpha * guided) / NOISY.sigma
    plain = (x_t - NOISY.alpha * EXACT(x_t, NOISY, None).x_0_hat) / NOISY.sigma
    assert_close(eps_hat, plain - scale * NOISY.sigma * classifier, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_exact_classifier_guidance_is_classifier_free_guidance(scale):
    x_t = noisy()
    guided = Bayes(scale)(Marginal(MIXTURE))(x_t, NOISY, CONDITION).x_0_hat
    assert_close(guided, ClassifierFree(scale)(EXACT)(x_t, NOISY, CONDITION).x_0_hat, rtol=1e-8, atol=1e-8)


def test_classifier_in_a_file_is_told_the_noise_level(scripted):
    guidance = ClassifierGuidance(1.0, scripted(NoisyClassifier()))
    for level in levels(Cosine(), [0.1, 0.5, 0.9]):
        x_t = noisy(level)
        guided = guidance(Marginal(MIXTURE))(x_t, level, CONDITION).x_0_hat
        assert_close(guided, EXACT(x_t, level, CONDITION).x_0_hat, rtol=1e-8, atol=1e-8)


def linear_response(sampler, schedule, denoiser, data, label=1):
    """Mean (2,) and covariance (2, 2) of what is drawn for a class, which is Gaussian, so that the map is affine."""
    rows, calls = 1 + 2 * (sampler.num_steps + 1), 0

    def noise():
        nonlocal calls
        z = torch.zeros(rows, 2, dtype=torch.float64)
        z[1 + 2 * calls : 3 + 2 * calls] = torch.eye(2)
        calls += 1
        return z

    (end,) = levels(schedule, [schedule.t_range[1]])
    root = torch.linalg.cholesky(data.covariance_t(*at(end)))
    x_T = (data.mean_t(*at(end)) + noise() @ root.T) / end.sigma
    x = sampler(denoiser, schedule, FixedSmall(), x_T, torch.full((rows,), label), noise)
    return x[0], (x[1:] - x[0]).T @ (x[1:] - x[0])


@every_schedule
@each("label", [0, 1])
@each("eta", [0.0, 1.0])
def test_samples_under_the_exact_classifier_are_those_of_the_classs_own_denoiser(schedule, label, eta):
    """Under any schedule, of both classes: whatever is proven of solvers with an exact denoiser holds of guided ones.

    But for the very first step where alpha is 0: the classifier's gradient is 0 there.
    """
    schedule, data = schedule.frozen(), MIXTURE.conditional(label)
    sampler = Sampler(DDIM(eta), UniformLogSNR(), 12, None)
    atol = 1e-7 if schedule.at_noisy_end.alpha > 0 else 5e-3
    guided = linear_response(sampler, schedule, Bayes(1.0)(Marginal(MIXTURE)), data, label)
    assert_close(guided, linear_response(sampler, schedule, ExactDenoiser(data), data), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_under_the_exact_classifier_have_the_mean_and_covariance_of_the_class(scripted, eta):
    sampler, data = Sampler(DDIM(eta), UniformTime(), 120, None), MIXTURE.conditional(1)
    guided = ClassifierGuidance(1.0, scripted(NoisyClassifier()))(Marginal(MIXTURE))
    mean, covariance = linear_response(sampler, Cosine(), guided, data)
    exact = linear_response(sampler, Cosine(), ExactDenoiser(data), data)
    assert_close((mean, covariance), exact, rtol=1e-7, atol=1e-7)  # the very same discretisation
    assert_close(mean, data.mean(), rtol=0, atol=0.02)
    assert_close(covariance, data.covariance(), rtol=0, atol=0.02)
    assert (MIXTURE.mean() - data.mean()).abs().max() > 0.2
    assert (MIXTURE.covariance() - data.covariance()).abs().max() > 0.2


@pytest.mark.parametrize("net", [Net, FeaturesThenLogits])
def test_clean_classifiers_gradient_goes_through_the_denoiser(scripted, net):
    net, x_t = net(2, 3), noisy()
    guidance = CleanClassifierGuidance(2.5, scripted(net))
    net.eval()

    def log_p(x):
        x_0_hat = EXACT(x, NOISY, CONDITION).x_0_hat
        logits = net(x_0_hat)
        logits = logits[-1] if isinstance(logits, tuple) else logits
        return torch.log(logits.softmax(1)[torch.arange(40), CONDITION]).detach()

    gradient = gradient_of(guidance, x_t, CONDITION)
    assert_close(gradient, finite_difference(log_p, x_t), rtol=1e-6, atol=1e-8)
    assert gradient.norm(dim=1).min() > 1e-3


def test_clean_classifiers_gradient_is_the_posterior_covariance_times_the_classifiers_own():
    x_t = noisy()
    x_0_hat = EXACT(x_t, NOISY, None).x_0_hat.requires_grad_()
    log_p = CLEAN(x_0_hat).log_softmax(1)[torch.arange(40), CONDITION]
    (at_x_0_hat,) = torch.autograd.grad(log_p.sum(), x_0_hat)
    gradient = gradient_of(CleanBayes(2.0), x_t, CONDITION, denoiser=Marginal(MIXTURE))
    assert_close(gradient, through_the_denoiser(at_x_0_hat, x_t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clean", [False, True])
def test_similaritys_gradient_is_that_of_the_cosine(scripted, tmp_path, clean):
    """grad cos(u, v) = J^T (v / |u||v| - cos u / |u|^2), u = J x."""

    class Code(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)).double())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.matrix, x

    np.save(tmp_path / "y.npy", np.array([0.3, -2.0]))
    ours, theirs = Code(1), Code(2)
    guidance = SimilarityGuidance(5.0, scripted(ours), scripted(theirs), str(tmp_path / "y.npy"), clean)
    x_t, v = noisy(), (torch.tensor([0.3, -2.0], dtype=torch.float64) @ theirs.matrix).detach()
    J = ours.matrix.detach()
    u = (EXACT(x_t, NOISY, None).x_0_hat if clean else x_t) @ J
    lengths, cosine = u.norm(dim=1, keepdim=True), (u @ v / u.norm(dim=1) / v.norm())[:, None]
    expected = (v / (lengths * v.norm()) - cosine * u / lengths**2) @ J.T
    expected = through_the_denoiser(expected, x_t) if clean else expected
    assert_close(gradient_of(guidance, x_t, None), expected, rtol=1e-8, atol=1e-8)  # needs no condition
