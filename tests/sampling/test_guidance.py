"""Classifier-free guidance against exact conditional and marginal denoisers of a mixture."""

import pytest
import torch
from exact import MIXTURE, ExactDenoiser
from options import built, each
from torch.testing import assert_close

from diffusion_trainer.sampling.guidance import ClassifierFree, NoGuidance

SCHEDULES = built("schedule")
every_schedule = each("schedule", SCHEDULES)
every_scale = pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
COSINE = ExactDenoiser(MIXTURE, SCHEDULES["cosine"])


class Counting(ExactDenoiser):
    """Counts its calls and the samples in them."""

    def __call__(self, x_t, t, condition):
        self.__dict__.setdefault("sizes", []).append(len(x_t))
        return super().__call__(x_t, t, condition)


def noisy(schedule, n=40):
    """x_t (n, 2), t (n,) all different, condition (n,), alpha and sigma (n,)."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return MIXTURE.sample_t(n, alpha, sigma, generator), t, torch.arange(n) % 2, alpha, sigma


@pytest.mark.parametrize("guidance", [ClassifierFree(1.0), ClassifierFree(1), NoGuidance()], ids=str)
def test_scale_1_is_the_denoiser_itself(guidance):
    assert guidance(COSINE) is COSINE


def test_scale_0_is_the_unconditional_denoiser():
    x_t, t, condition, *_ = noisy(COSINE.schedule)
    assert_close(ClassifierFree(0.0)(COSINE)(x_t, t, condition), COSINE(x_t, t, None), rtol=1e-12, atol=1e-12)


@every_schedule
@every_scale
def test_guided_estimate_is_the_line_through_the_exact_conditional_and_marginal(scale, schedule):
    x_t, t, condition, alpha, sigma = noisy(schedule)
    marginal = MIXTURE.denoise(x_t, alpha, sigma)
    given = torch.stack([MIXTURE.conditional(k).denoise(x_t, alpha, sigma) for k in (0, 1)])
    conditional = given[condition, torch.arange(len(t))]
    guided = ClassifierFree(scale)(ExactDenoiser(MIXTURE, schedule))(x_t, t, condition)
    assert_close(guided, marginal + scale * (conditional - marginal), rtol=1e-10, atol=1e-10)
    assert (conditional - marginal).abs().max() > 0.1


@every_schedule
@every_scale
def test_guided_score_adds_scale_times_the_score_of_the_classifier(scale, schedule):
    x_t, t, condition, alpha, sigma = noisy(schedule)
    guided = ClassifierFree(scale)(ExactDenoiser(MIXTURE, schedule))(x_t, t, condition)
    score = (alpha[:, None] * guided - x_t) / sigma[:, None] ** 2  # Tweedie
    classifier = MIXTURE.classifier_score(x_t, alpha, sigma)[torch.arange(len(t)), condition]
    expected = MIXTURE.score(x_t, alpha, sigma) + scale * classifier
    assert_close(score, expected, rtol=1e-7, atol=1e-7)


def test_equation_6_of_ho_and_salimans_with_scale_1_plus_w():
    x_t, t, condition, alpha, sigma = noisy(COSINE.schedule)

    def eps_hat(denoiser, condition):
        return (x_t - alpha[:, None] * denoiser(x_t, t, condition)) / sigma[:, None]

    w = 2.0
    expected = (1 + w) * eps_hat(COSINE, condition) - w * eps_hat(COSINE, None)
    assert_close(eps_hat(ClassifierFree(1 + w)(COSINE), condition), expected, rtol=1e-9, atol=1e-9)


@every_scale
def test_no_condition_passes_through_and_is_not_nulled(scale):
    class AsClassLabels(ExactDenoiser):
        def null(self, condition):
            return torch.full_like(condition, 2)  # refuses None

    x_t, t, *_ = noisy(COSINE.schedule)
    denoiser = AsClassLabels(MIXTURE, SCHEDULES["cosine"])
    assert torch.equal(ClassifierFree(scale)(denoiser)(x_t, t, None), COSINE(x_t, t, None))


def test_model_without_a_null_condition_is_left_alone():
    class Unconditional(ExactDenoiser):
        def null(self, condition):
            return None

    x_t, t, condition, *_ = noisy(COSINE.schedule)
    denoiser = Unconditional(MIXTURE, SCHEDULES["cosine"])
    assert torch.equal(ClassifierFree(3.0)(denoiser)(x_t, t, condition), denoiser(x_t, t, condition))


def test_guidance_is_one_call_of_twice_the_batch_and_one_of_the_batch_without_condition():
    denoiser = Counting(MIXTURE, SCHEDULES["cosine"])
    x_t, t, condition, *_ = noisy(denoiser.schedule)
    ClassifierFree(3.0)(denoiser)(x_t, t, condition)
    ClassifierFree(3.0)(denoiser)(x_t, t, None)
    assert denoiser.sizes == [2 * len(t), len(t)]


def test_images_are_guided_sample_by_sample():
    class Label(ExactDenoiser):
        def __call__(self, x_t, t, condition):
            return x_t * t[:, None, None, None] + condition[:, None, None, None]

    x_t, t, condition = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([0, 1])
    guided = ClassifierFree(3.0)(Label(MIXTURE, SCHEDULES["cosine"]))(x_t, t, condition)
    label = (2 + 3 * (condition - 2)).float()  # the null condition is 2
    assert_close(guided, x_t * t[:, None, None, None] + label[:, None, None, None])


def test_nested_guidance_multiplies_the_scales():
    x_t, t, condition, *_ = noisy(COSINE.schedule)
    nested = ClassifierFree(2.0)(ClassifierFree(1.5)(COSINE))
    assert_close(nested(x_t, t, condition), ClassifierFree(3.0)(COSINE)(x_t, t, condition), rtol=1e-9, atol=1e-9)


@each("guidance", built("guidance"))
def test_guidance_of_conf_keeps_null_and_shape(guidance):
    x_t, t, condition, *_ = noisy(COSINE.schedule)
    guided = guidance(COSINE)
    assert torch.equal(guided.null(condition), COSINE.null(condition))
    assert guided(x_t, t, condition).shape == x_t.shape


def test_negative_scale_is_refused():
    with pytest.raises(ValueError, match="scale"):
        ClassifierFree(-0.5)
