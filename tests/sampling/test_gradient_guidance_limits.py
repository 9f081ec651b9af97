"""Guidance by gradients where there is nothing to guide by, and what autograd sees of it."""

import numpy as np
import pytest
import torch
from exact import MIXTURE
from sampling.classifiers import (
    CLEAN,
    CONDITION,
    EXACT,
    NOISY,
    Bayes,
    CleanBayes,
    Marginal,
    Net,
    NoisyClassifier,
    finite_difference,
    gradient_of,
    noisy,
    scripting,
)
from solving import Noise
from torch.testing import assert_close

from diffusion_trainer.process.schedules import Cosine, RectifiedFlow
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.gradient_guidance import (
    ClassifierGuidance,
    CleanClassifierGuidance,
    SimilarityGuidance,
    log_probability,
)
from diffusion_trainer.sampling.grids import UniformTime
from diffusion_trainer.sampling.guidance import ClassifierFree, Nested
from diffusion_trainer.sampling.sampler import Sampler


@pytest.fixture
def scripted(tmp_path):
    return scripting(tmp_path)


def test_the_null_class_is_not_guided_and_what_is_no_number_there_stays_apart(scripted):
    x_t, condition = noisy(), torch.arange(40) % 4 - 1  # -1 and 2 are no classes
    known = (condition == 0) | (condition == 1)
    guided = CleanBayes(3.0)(Marginal(MIXTURE))(x_t, NOISY, condition).x_0_hat
    plain = EXACT(x_t, NOISY, None).x_0_hat
    assert torch.equal(guided[~known], plain[~known])
    assert (guided[known] != plain[known]).all()
    logits = torch.full((2, 3), torch.inf, dtype=torch.float64)
    logits[1] = 0
    logits.requires_grad_()
    log_p = log_probability(logits, torch.tensor([3, 1]), "it")
    assert log_p.tolist() == pytest.approx([0, -np.log(3)])
    log_p.sum().backward()
    assert torch.equal(logits.grad[0], torch.zeros(3, dtype=torch.float64))
    assert_close(logits.grad[1], torch.tensor([-1, 2, -1], dtype=torch.float64) / 3)


@pytest.mark.parametrize("guidance", [Bayes(2.0), CleanBayes(2.0)], ids=["noisy", "clean"])
def test_without_signal_nothing_is_added(guidance):
    x_t, end = noisy(), RectifiedFlow(t_max=1.0).at_noisy_end
    assert end.alpha == 0
    assert torch.equal(guidance(EXACT)(x_t, end, CONDITION).x_0_hat, EXACT(x_t, end, CONDITION).x_0_hat)


@pytest.mark.parametrize("guidance", [Bayes(0.0), CleanBayes(0), ClassifierGuidance(0.0, "no such file")], ids=str)
def test_scale_0_is_the_denoiser_itself(guidance):
    assert guidance(EXACT) is EXACT


@pytest.mark.parametrize("guidance", [Bayes(2.0), CleanBayes(2.0)], ids=["noisy", "clean"])
def test_no_graph_is_kept_and_no_gradient_reaches_what_is_given(guidance):
    class Trained(Marginal):
        def __call__(self, x_t, level, condition):
            x_0_hat, _ = super().__call__(x_t, level, condition)
            return Estimate(weight * x_0_hat, weight * x_0_hat)

    weight, x_t = torch.ones((), dtype=torch.float64, requires_grad=True), noisy()
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            guided = guidance(Trained(MIXTURE))(x_t, NOISY, CONDITION)
        assert not guided.x_0_hat.requires_grad
        assert not guided.second.requires_grad
    assert weight.grad is None
    assert not x_t.requires_grad


def test_a_gradient_outside_differentiates_through_all_that_is_inside(scripted):
    x_t = noisy()
    inside = Nested([ClassifierGuidance(0.7, scripted(NoisyClassifier())), CleanBayes(0.3), ClassifierFree(2.0)])(EXACT)

    def log_p(x):
        return CLEAN(inside(x, NOISY, CONDITION).x_0_hat).log_softmax(1)[torch.arange(40), CONDITION].detach()

    gradient = gradient_of(CleanBayes(1.5), x_t, CONDITION, denoiser=inside)
    assert_close(gradient, finite_difference(log_p, x_t), rtol=1e-5, atol=1e-7)


def test_the_sampler_runs_it_without_gradients(scripted):
    sampler = Sampler(DDIM(), UniformTime(), 3, None)
    guided = CleanClassifierGuidance(1.0, scripted(Net(2, 2)))(EXACT)
    noise = Noise(40)
    x = sampler(guided, Cosine(), FixedSmall(), noise(), CONDITION, noise)
    assert not x.requires_grad
    assert not torch.equal(x, sampler(EXACT, Cosine(), FixedSmall(), Noise(40)(), CONDITION, noise))


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(scale):
    for make in (Bayes, lambda s: ClassifierGuidance(s, "x"), lambda s: SimilarityGuidance(s, "x", "x", "x")):
        with pytest.raises(ValueError, match="scale must not be negative nor infinite"):
            make(scale)
