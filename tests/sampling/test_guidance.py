"""Guidance by a second estimate, against exact conditional and marginal denoisers of a mixture; how guidances nest."""

from dataclasses import dataclass, field
from math import inf, nan

import pytest
import torch
from cases import each
from exact import MIXTURE, ExactDenoiser
from options import built
from torch.testing import assert_close

from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.variances import Estimate
from diffusion_trainer.sampling.guidance import (
    AutoGuidance,
    ClassifierFree,
    Guidance,
    Guided,
    Interval,
    Nested,
    NoGuidance,
    WeakModel,
)
from diffusion_trainer.sampling.thresholding import StaticThreshold

SCHEDULES = built("schedule")
every_schedule = each("schedule", SCHEDULES)
every_scale = each("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
CPU = torch.device("cpu")
EXACT = ExactDenoiser(MIXTURE)
NOISY = Level(0.5, 0.8, 0.6)  # log-SNR 0.575
CONDITION = torch.arange(40) % 2


def noisy(level=NOISY, seed=0):
    """x_t (40, 2); its log-SNR is not so high that the estimates agree, nor so low."""
    at = torch.tensor(level.alpha, dtype=torch.float64), torch.tensor(level.sigma, dtype=torch.float64)
    return MIXTURE.sample_t(40, *at, torch.Generator().manual_seed(seed)), at


@dataclass(frozen=True)
class Counting(Denoiser):
    """Counts its calls and the samples in them; has a second output, which tells the condition."""

    inner: Denoiser = EXACT
    sizes: list[int] = field(default_factory=list)

    def __call__(self, x_t, level, condition):
        self.sizes.append(len(x_t))
        return Estimate(self.inner(x_t, level, condition).x_0_hat, condition)

    def null(self, condition):
        return self.inner.null(condition)


@dataclass(frozen=True)
class Weak(WeakModel):
    """A denoiser that needs no loading; remembers for which devices it was asked."""

    of: Denoiser
    asked: list[torch.device] = field(default_factory=list)

    def denoiser(self, device):
        self.asked.append(device)
        return self.of


class Marginal(ExactDenoiser):
    """Never listens to the condition."""

    def __call__(self, x_t, level, condition):
        return super().__call__(x_t, level, None)


@dataclass(frozen=True)
class Affine(Guidance):
    """factor x_0_hat + shift: does not commute with its like."""

    factor: float
    shift: float

    def __call__(self, denoiser):
        guidance = self

        class Shifted(Guided):
            def __call__(self, x_t, level, condition):
                x_0_hat, second = self.inner(x_t, level, condition)
                return Estimate(guidance.factor * x_0_hat + guidance.shift, second)

        return Shifted(denoiser)


IDENTITIES = [
    NoGuidance(), ClassifierFree(1.0), ClassifierFree(1), ClassifierFree(1.0, 0.5), AutoGuidance(1.0, Weak(EXACT)),
    Interval(ClassifierFree(1.0), -1, 1), Nested([]), Nested([NoGuidance(), ClassifierFree(1.0)]),
]  # fmt: skip


@pytest.mark.parametrize("guidance", IDENTITIES, ids=str)
def test_what_changes_nothing_is_the_denoiser_itself(guidance):
    assert guidance(EXACT) is EXACT


def test_scale_0_is_the_unconditional_denoiser():
    x_t, _ = noisy()
    guided = ClassifierFree(0.0)(EXACT)(x_t, NOISY, CONDITION).x_0_hat
    assert_close(guided, EXACT(x_t, NOISY, None).x_0_hat, rtol=1e-12, atol=1e-12)


@every_schedule
@every_scale
def test_guided_estimate_is_the_line_through_the_exact_conditional_and_marginal(scale, schedule):
    apart = 0.0
    for level in levels(schedule, [0.1, 0.5, 0.9]):
        x_t, at = noisy(level)
        marginal = MIXTURE.denoise(x_t, *at)
        given = torch.stack([MIXTURE.conditional(k).denoise(x_t, *at) for k in (0, 1)])
        conditional = given[CONDITION, torch.arange(40)]
        guided = ClassifierFree(scale)(EXACT)(x_t, level, CONDITION).x_0_hat
        assert_close(guided, marginal + scale * (conditional - marginal), rtol=1e-10, atol=1e-10)
        apart = max(apart, (conditional - marginal).abs().max().item())
    assert apart > 0.1


@every_schedule
@every_scale
def test_guided_score_adds_scale_times_the_score_of_the_classifier(scale, schedule):
    for level in levels(schedule, [0.3, 0.5, 0.9]):
        x_t, at = noisy(level)
        guided = ClassifierFree(scale)(EXACT)(x_t, level, CONDITION).x_0_hat
        score = (level.alpha * guided - x_t) / level.sigma**2  # Tweedie
        classifier = MIXTURE.classifier_score(x_t, *at)[torch.arange(40), CONDITION]
        assert_close(score, MIXTURE.score(x_t, *at) + scale * classifier, rtol=1e-7, atol=1e-7)


def test_equation_6_of_ho_and_salimans_with_scale_1_plus_w():
    x_t, _ = noisy()

    def eps_hat(denoiser, condition):
        return (x_t - NOISY.alpha * denoiser(x_t, NOISY, condition).x_0_hat) / NOISY.sigma

    w = 2.0
    expected = (1 + w) * eps_hat(EXACT, CONDITION) - w * eps_hat(EXACT, None)
    assert_close(eps_hat(ClassifierFree(1 + w)(EXACT), CONDITION), expected, rtol=1e-9, atol=1e-9)


@every_scale
def test_no_condition_passes_through_and_is_not_nulled(scale):
    class AsClassLabels(ExactDenoiser):
        def null(self, condition):
            return torch.full_like(condition, 2)  # refuses None

    x_t, _ = noisy()
    guided = ClassifierFree(scale)(AsClassLabels(MIXTURE))(x_t, NOISY, None)
    assert torch.equal(guided.x_0_hat, EXACT(x_t, NOISY, None).x_0_hat)


def test_model_without_a_null_condition_is_left_alone():
    class Unconditional(ExactDenoiser):
        def null(self, condition):
            return None

    x_t, _ = noisy()
    denoiser = Unconditional(MIXTURE)
    guided = ClassifierFree(3.0)(denoiser)(x_t, NOISY, CONDITION)
    assert torch.equal(guided.x_0_hat, denoiser(x_t, NOISY, CONDITION).x_0_hat)


def test_guidance_is_one_call_of_twice_the_batch_and_one_of_the_batch_without_condition():
    denoiser, (x_t, _) = Counting(), noisy()
    ClassifierFree(3.0)(denoiser)(x_t, NOISY, CONDITION)
    ClassifierFree(3.0)(denoiser)(x_t, NOISY, None)
    assert denoiser.sizes == [80, 40]


def test_images_are_guided_sample_by_sample():
    class Label(ExactDenoiser):
        def __call__(self, x_t, level, condition):
            return Estimate(x_t * level.t + condition[:, None, None, None])

    x_t, condition = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
    guided = ClassifierFree(3.0)(Label(MIXTURE))(x_t, NOISY, condition).x_0_hat
    label = (2 + 3 * (condition - 2)).float()  # the null condition is 2
    assert_close(guided, x_t * NOISY.t + label[:, None, None, None])


@dataclass(frozen=True)
class Image(Denoiser):
    """A picture of its own for each condition: (B, 3, 4, 4)."""

    spread: float = 1.0

    def __call__(self, x_t, level, condition):
        label = condition.double()[:, None, None, None]
        return Estimate(self.spread * (x_t * (1 + label) + label.sin() * x_t.flip(0)) + label)

    def null(self, condition):
        return torch.full_like(condition, 2)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescale_moves_each_samples_standard_deviation_to_the_conditional_ones(rescale):
    x_t = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    condition = torch.tensor([0, 1, 3, 0, 1])
    conditional = Image()(x_t, NOISY, condition).x_0_hat
    plain = ClassifierFree(3.0)(Image())(x_t, NOISY, condition).x_0_hat
    rescaled = ClassifierFree(3.0, rescale)(Image())(x_t, NOISY, condition).x_0_hat
    for i in range(5):  # eq. 15 and 16 of Lin et al., one sample after the other
        pulled = plain[i] * (conditional[i].std() / plain[i].std())
        assert_close(rescaled[i], rescale * pulled + (1 - rescale) * plain[i], rtol=1e-12, atol=1e-12)
    deviations = plain.flatten(1).std(1) / conditional.flatten(1).std(1)
    assert ((deviations - 1).abs() > 0.1).all()


def test_rescale_leaves_a_constant_image_finite():
    x_t = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    x_0_hat = ClassifierFree(3.0, 1.0)(Image(0.0))(x_t, NOISY, torch.tensor([0, 1, 3, 0])).x_0_hat
    assert_close(x_0_hat[:, 0, 0, 0], torch.tensor([-4.0, -1, 5, -4], dtype=torch.float64))


@pytest.mark.parametrize(
    "guidance", [ClassifierFree(3.0), ClassifierFree(3.0, 0.5), AutoGuidance(3.0, Weak(EXACT)),
                 Interval(ClassifierFree(3.0), 0, 1), Interval(ClassifierFree(3.0), 2, 3),
                 Nested([ClassifierFree(3.0), AutoGuidance(2.0, Weak(EXACT))])], ids=str
)  # fmt: skip
def test_second_output_is_that_of_the_condition_itself_and_null_the_denoisers_own(guidance):
    x_t, _ = noisy()
    guided = guidance(Counting())
    assert torch.equal(guided(x_t, NOISY, CONDITION).second, CONDITION)
    assert torch.equal(guided.null(CONDITION), EXACT.null(CONDITION))
    assert guided.null(None) is None


def test_autoguidance_by_itself_is_the_identity_and_by_the_marginal_is_classifier_free():
    x_t, _ = noisy()
    by_itself = AutoGuidance(4.0, Weak(EXACT))(EXACT)(x_t, NOISY, CONDITION).x_0_hat
    assert_close(by_itself, EXACT(x_t, NOISY, CONDITION).x_0_hat, rtol=1e-12, atol=1e-12)
    for scale in (0.0, 0.5, 4.0):
        by_marginal = AutoGuidance(scale, Weak(Marginal(MIXTURE)))(EXACT)(x_t, NOISY, CONDITION).x_0_hat
        classifier_free = ClassifierFree(scale)(EXACT)(x_t, NOISY, CONDITION).x_0_hat
        assert_close(by_marginal, classifier_free, rtol=1e-12, atol=1e-12)


def test_autoguidance_needs_no_condition():
    x_t, _ = noisy()
    other = ExactDenoiser(MIXTURE.conditional(0))
    guided = AutoGuidance(3.0, Weak(other))(EXACT)(x_t, NOISY, None).x_0_hat
    strong, weak = EXACT(x_t, NOISY, None).x_0_hat, other(x_t, NOISY, None).x_0_hat
    assert_close(guided, strong + 2 * (strong - weak), rtol=1e-12, atol=1e-12)


@dataclass(frozen=True)
class Prepared(ExactDenoiser):
    """Remembers for what it was prepared."""

    precision: torch.dtype = torch.float16
    seen: list = field(default_factory=list)

    def prepare(self, levels, device):
        self.seen.append((levels, device))


@pytest.mark.parametrize("wrapped", [lambda g: g, lambda g: Interval(g, 5, 6), lambda g: Nested([g, g])])
def test_a_run_is_prepared_for_and_precision_asked_through_any_guidance(wrapped):
    ours, theirs = Prepared(MIXTURE), Prepared(MIXTURE)
    guided = wrapped(AutoGuidance(3.0, Weak(theirs)))(ours)
    guided.prepare([NOISY], CPU)
    assert ours.seen == [([NOISY], CPU)]
    assert set(map(str, theirs.seen)) == {str(([NOISY], CPU))}
    assert guided.precision == torch.float16


@pytest.mark.parametrize(
    "wrapped", [lambda g: g, lambda g: Interval(g, 5, 6), lambda g: Nested([StaticThreshold(), g])]
)
def test_estimates_of_two_models_are_as_coarse_as_the_coarser(wrapped):
    for ours, theirs in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        guided = wrapped(AutoGuidance(3.0, Weak(Prepared(MIXTURE, theirs))))(Prepared(MIXTURE, ours))
        guided.prepare([NOISY], CPU)
        assert guided.precision == torch.bfloat16


def test_weak_model_is_loaded_at_the_first_estimate_and_once_for_each_device():
    weak, (x_t, _) = Weak(EXACT), noisy()
    guidance = AutoGuidance(2.0, weak)
    denoisers = [guidance(EXACT), guidance(EXACT)]
    assert weak.asked == []
    for denoiser in denoisers * 2:
        denoiser(x_t, NOISY, CONDITION)
    assert weak.asked == [CPU]
    guidance.weak_denoiser(torch.device("meta"))
    assert weak.asked == [CPU, torch.device("meta")]


def test_weak_model_of_other_data_is_refused():
    x_t = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    class Smaller(Image):
        def __call__(self, x_t, level, condition):
            return super().__call__(x_t[:, :1], level, condition)

    with pytest.raises(UserError, match=r"guidance.weak.*\(2, 1, 4, 4\).*\(2, 3, 4, 4\)"):
        AutoGuidance(2.0, Weak(Smaller()))(Image())(x_t, NOISY, torch.tensor([0, 1]))


def test_outside_of_the_interval_the_conditional_model_alone_is_called():
    guidance, x_t = Interval(ClassifierFree(3.0), -1.0, 2.0), noisy()[0]
    inside = [-1 + 1e-9, 0.0, 2 - 1e-9]
    for log_snr in (-inf, -5.0, -1 - 1e-9, *inside, 2 + 1e-9, 5.0):
        alpha = torch.tensor(log_snr, dtype=torch.float64).sigmoid().sqrt().item()
        level, denoiser = Level(0.5, alpha, (1 - alpha**2) ** 0.5), Counting()
        guided = guidance(denoiser)(x_t, level, CONDITION)
        alone = log_snr not in inside
        assert denoiser.sizes == ([40] if alone else [80])
        expected = (EXACT if alone else ClassifierFree(3.0)(EXACT))(x_t, level, CONDITION)
        assert torch.equal(guided.x_0_hat, expected.x_0_hat)


def test_interval_holds_for_any_guidance_and_its_ends_belong_to_it():
    x_t, _ = noisy()
    edge = NOISY.log_snr
    for low, high, alone in ((edge, 3, False), (-3, edge, False), (edge + 1e-12, 3, True), (-3, edge - 1e-12, True)):
        denoiser = Counting()
        Interval(Nested([AutoGuidance(2.0, Weak(denoiser))]), low, high)(denoiser)(x_t, NOISY, CONDITION)
        assert len(denoiser.sizes) == (1 if alone else 2)


def test_nested_guidance_multiplies_the_scales():
    x_t, _ = noisy()
    expected = ClassifierFree(3.0)(EXACT)(x_t, NOISY, CONDITION).x_0_hat
    for nested in (
        ClassifierFree(2.0)(ClassifierFree(1.5)(EXACT)),
        Nested([ClassifierFree(1.5), ClassifierFree(2.0)])(EXACT),
    ):
        assert_close(nested(x_t, NOISY, CONDITION).x_0_hat, expected, rtol=1e-9, atol=1e-9)


def test_the_first_part_is_innermost():
    x_t, _ = noisy()
    plain = EXACT(x_t, NOISY, CONDITION).x_0_hat
    nested = Nested([Affine(2.0, 0.0), Affine(1.0, 5.0), Nested([Affine(-1.0, 0.0), Affine(1.0, 1.0)])])
    assert_close(nested(EXACT)(x_t, NOISY, CONDITION).x_0_hat, -(2 * plain + 5) + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierFree(-0.5), "scale must not be negative.*-0.5"),
        (lambda: ClassifierFree(nan), "scale must not be negative.*nan"),
        (lambda: ClassifierFree(inf), "scale must not be negative nor infinite"),
        (lambda: ClassifierFree(2.0, 1.5), r"rescale must lie in \[0, 1\], not 1.5"),
        (lambda: ClassifierFree(2.0, -0.1), r"rescale must lie in \[0, 1\]"),
        (lambda: AutoGuidance(-1.0, Weak(EXACT)), "scale must not be negative"),
        (lambda: Interval(NoGuidance(), 2.0, 2.0), "low=2.0 to high=2.0 is empty"),
        (lambda: Interval(NoGuidance(), 3.0, -3.0), "low=3.0 to high=-3.0 is empty"),
        (lambda: Interval(NoGuidance(), nan, 3.0), "is empty"),
        (lambda: Nested([NoGuidance(), {"scale": 2}]), "parts must be guidances.*scale"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
