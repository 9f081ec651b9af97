"""Guidance by gradients: exact classifiers turn exact marginal denoisers into exact conditional ones."""

from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import pytest
import torch
import yaml
from cases import each
from exact import MIXTURE, ExactDenoiser
from options import built, names
from PIL import Image as Picture
from solving import Noise
from torch import Tensor, nn
from torch.testing import assert_close

from diffusion_trainer.apps.config import CONF
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.schedules import Cosine, RectifiedFlow
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.gradient_guidance import (
    ClassifierGuidance,
    CleanClassifierGuidance,
    GradientGuidance,
    SimilarityGuidance,
    log_probability,
)
from diffusion_trainer.sampling.grids import UniformTime
from diffusion_trainer.sampling.guidance import AutoGuidance, ClassifierFree, Interval, Nested, WeakModel
from diffusion_trainer.sampling.sampler import Sampler
from diffusion_trainer.sampling.torchscript import read_reference

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


@pytest.fixture
def scripted(tmp_path):
    """scripted(module) -> path of its TorchScript file."""

    def save(module):
        path = tmp_path / f"{next(FILES)}.pt"
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


def linear_response(sampler, schedule, denoiser, data):
    """Mean (2,) and covariance (2, 2) of what is drawn for class 1, which is Gaussian, so that the map is affine."""
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
    x = sampler(denoiser, schedule, FixedSmall(), x_T, torch.ones(rows, dtype=torch.int64), noise)
    return x[0], (x[1:] - x[0]).T @ (x[1:] - x[0])


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


@dataclass(frozen=True)
class Image(Denoiser):
    """(B, C, H, W); listens to the condition."""

    def __call__(self, x_t, level, condition):
        return Estimate(0.5 * x_t if condition is None else 0.5 * x_t + 0.1 * condition[:, None, None, None])

    def null(self, condition):
        return torch.full_like(condition, 2)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3)])
def test_a_picture_is_shown_in_the_range_and_channels_of_the_images(tmp_path, mode, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    pixels[0, 0], pixels[0, 1] = 0, 255
    Picture.fromarray(pixels).convert(mode).save(tmp_path / "y.png")
    shown = read_reference(str(tmp_path / "y.png"), channels)
    assert shown.shape == (1, channels, 4, 6)
    assert (shown[0, :, 0, 0].tolist(), shown[0, :, 0, 1].tolist()) == ([-1] * channels, [1] * channels)
    if channels == 3:
        assert_close(shown[0], torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)


def test_an_array_is_shown_as_it_is(tmp_path):
    np.save(tmp_path / "y.npy", np.arange(6))
    assert torch.equal(read_reference(str(tmp_path / "y.npy"), 3), torch.arange(6)[None])


def test_similarity_to_a_picture_grows(scripted, tmp_path):
    Picture.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4), np.uint8)).save(tmp_path / "y.png")
    encoder = scripted(Net(16, 5).float())
    guidance = SimilarityGuidance(0.5, encoder, encoder, str(tmp_path / "y.png"))
    x_t = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def similarity(denoiser):
        x_0_hat = denoiser(x_t, NOISY, None).x_0_hat
        return guidance.log_potential(x_t, x_0_hat, NOISY, None)

    assert (similarity(guidance(Image())) > similarity(Image())).all()


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


class BadShape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


def test_what_cannot_be_used_is_said_when_it_is_used(scripted, tmp_path):
    x_t, text = noisy(), tmp_path / "text.pt"
    text.write_text("no network")
    good, noisy_one, other = scripted(Net(2, 2)), scripted(KnowsNoise(2, 2)), scripted(Net(2, 5))
    np.save(tmp_path / "y.npy", np.zeros(2))
    np.save(tmp_path / "long.npy", np.zeros(3))
    y, absent = str(tmp_path / "y.npy"), str(tmp_path / "absent.pt")
    cases = [
        (ClassifierGuidance(1.0, absent), CONDITION, "absent.pt: there is no such file.*x_t.*log_snr.*logits"),
        (CleanClassifierGuidance(1.0, absent), CONDITION, r"absent.pt: there is no such file.*images.*logits"),
        (CleanClassifierGuidance(1.0, str(text)), CONDITION, "text.pt is not a TorchScript file.*classifier"),
        (CleanClassifierGuidance(1.0, noisy_one), CONDITION, "takes 2 inputs, not 1; it should be a classifier"),
        (ClassifierGuidance(1.0, good), CONDITION, "takes 1 inputs, not 2; it should be a classifier of noisy"),
        (CleanClassifierGuidance(1.0, scripted(Net(3, 2))), CONDITION, r"does not take \(40, 2\) \(.*shapes"),
        (CleanClassifierGuidance(1.0, scripted(BadShape())), CONDITION, r"returns \(40,\).*\(40, K\)"),
        (CleanClassifierGuidance(1.0, good), None, "needs a label.*no condition"),
        (CleanClassifierGuidance(1.0, good), x_t, r"needs labels \(B,\) int64.*\(40, 2\)"),
        (SimilarityGuidance(1.0, good, good, absent), None, "absent.pt cannot be read.*picture or an array"),
        (SimilarityGuidance(1.0, good, good, str(text)), None, "text.pt cannot be read"),
        (SimilarityGuidance(1.0, absent, good, y), None, "absent.pt: there is no such file.*encoder: images"),
        (SimilarityGuidance(1.0, good, absent, y), None, "absent.pt: there is no such file.*encoder: reference"),
        (SimilarityGuidance(1.0, good, other, y), None, "do not belong together.*2 and 5"),
        (SimilarityGuidance(1.0, good, good, str(tmp_path / "long.npy")), None, r"does not take \(1, 3\)"),
    ]
    for guidance, condition, message in cases:
        denoiser = guidance(EXACT if condition is not x_t else Marginal(MIXTURE))
        with pytest.raises(UserError, match=message):
            denoiser(x_t, NOISY, condition)


def test_a_file_is_read_once_and_each_call_has_the_same_bits(scripted, tmp_path):
    path, x_t = scripted(Net(2, 2)), noisy()
    guidance = CleanClassifierGuidance(1.0, path)
    before = guidance(EXACT)(x_t, NOISY, CONDITION).x_0_hat
    (tmp_path / path).unlink()
    for _ in range(3):
        assert torch.equal(guidance(EXACT)(x_t, NOISY, CONDITION).x_0_hat, before)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(scale):
    for make in (Bayes, lambda s: ClassifierGuidance(s, "x"), lambda s: SimilarityGuidance(s, "x", "x", "x")):
        with pytest.raises(ValueError, match="scale must not be negative nor infinite"):
            make(scale)


@dataclass(frozen=True)
class Weak(WeakModel):
    def denoiser(self, device):
        return Image()


def node_of(name, files):
    """The yaml with its missing values filled in; a weak model needs a checkpoint, and has a test of its own."""
    node = yaml.safe_load((CONF / "guidance" / f"{name}.yaml").read_text())
    missing = {key: files[key] for key, value in node.items() if value == "???"}
    return {**node, **missing, **({"weak": Weak()} if "weak" in node else {})}


@pytest.mark.parametrize("name", names("guidance"))
def test_every_guidance_of_conf_keeps_null_and_shape(scripted, tmp_path, name):
    Picture.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "y.png")
    encoder, clean = scripted(Net(48, 5).float()), name == "clean_classifier"
    classifier = scripted((Net if clean else KnowsNoise)(48, 3).float())
    files = {"image_encoder": encoder, "reference_encoder": encoder, "reference": str(tmp_path / "y.png")}
    guidance = build(node_of(name, {**files, "classifier": classifier}), "guidance")
    guided, condition = guidance(Image()), torch.tensor([0, 1, 2])
    x_t = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_0_hat = guided(x_t, NOISY, condition).x_0_hat
    assert torch.equal(guided.null(condition), Image().null(condition))
    assert (x_0_hat.shape, x_0_hat.dtype) == (x_t.shape, x_t.dtype)
    assert x_0_hat.isfinite().all()
    once_more = Nested([guidance, Interval(guidance, -5.0, 5.0)])(Image())(x_t, NOISY, condition).x_0_hat
    assert once_more.shape == x_t.shape


def test_autoguidance_of_conf_is_built_from_the_scale_and_a_weak_model():
    guidance = build(node_of("autoguidance", {}), "guidance")
    assert guidance == AutoGuidance(2.0, Weak())
    assert replace(guidance, scale=1.0)(EXACT) is EXACT
