"""Guidance by the gradient of a log-potential: classifiers, and similarity to a reference."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.variances import Estimate
from diffusion_trainer.sampling.guidance import Guidance, Guided, check_scale
from diffusion_trainer.sampling.torchscript import TorchScript, first, last, read_reference


@dataclass(frozen=True)
class GradientGuidance(Guidance):
    """x_0_hat + scale (sigma^2 / alpha) grad_{x_t} log h(x_t): the score of p(x_t) h(x_t)^scale, by Tweedie's formula.

    The same as eps_hat - scale sigma grad log h (Dhariwal and Nichol 2021, algorithm 2; Su, eq. 9.19), so that it
    serves deterministic samplers and stochastic ones alike. Scale 0 is the identity; without signal (alpha = 0)
    nothing is added, whatever the scale.
    """

    scale: float

    def __post_init__(self):
        check_scale(self.scale)

    @property
    @abstractmethod
    def looks_at_x_0_hat(self) -> bool:
        """Whether log h reaches x_t through the denoiser, whose gradient costs some two more of its calls."""

    @abstractmethod
    def log_potential(self, x_t: Tensor, x_0_hat: Tensor, level: Level, condition: Tensor | None) -> Tensor:
        """log h of each sample, (B,), up to a constant; differentiable. x_t, x_0_hat: (B, ...)."""

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        return denoiser if self.scale == 0 else _Steered(denoiser, self)


@dataclass(frozen=True)
class _Steered(Guided):
    guidance: GradientGuidance

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        if level.alpha == 0:
            return self.inner(x_t, level, condition)
        # An outer guidance may differentiate through this one: then the gradient belongs to its graph.
        outer = torch.is_grad_enabled() and x_t.requires_grad
        with torch.enable_grad():
            x = x_t if outer else x_t.detach().requires_grad_()
            with torch.set_grad_enabled(outer or self.guidance.looks_at_x_0_hat):
                estimate = self.inner(x, level, condition)
            total = self.guidance.log_potential(x, estimate.x_0_hat, level, condition).sum()
            (gradient,) = torch.autograd.grad(total, x, create_graph=outer)
        x_0_hat, second = estimate if outer else (None if e is None else e.detach() for e in estimate)
        factor = self.guidance.scale * level.sigma**2 / level.alpha
        return Estimate(torch.add(x_0_hat, gradient, alpha=factor), second)


@dataclass(frozen=True)
class ClassifierGuidance(GradientGuidance):
    """log h = log p(label | x_t) of a classifier of noisy images (Dhariwal and Nichol 2021). A null class adds nothing.

    classifier: a TorchScript file, x_t (B, C, H, W) and log_snr (B,) -> logits (B, K), or a tuple that ends with them.
    """

    classifier: str

    @property
    def looks_at_x_0_hat(self) -> bool:
        return False

    def log_potential(self, x_t: Tensor, x_0_hat: Tensor, level: Level, condition: Tensor | None) -> Tensor:
        what = "a classifier of noisy images: x_t (B, C, H, W) and log_snr (B,) -> logits (B, K)"
        network = TorchScript(self.classifier, 2, what)
        logits = last(network(x_t, x_t.new_full((len(x_t),), level.log_snr)))
        return log_probability(logits, condition, self.classifier)


@dataclass(frozen=True)
class CleanClassifierGuidance(GradientGuidance):
    """log h = log p(label | x_0_hat(x_t)) of a classifier of clean images: no noisy one need be trained, but the
    gradient goes through the denoiser (forward guidance of Bansal et al. 2023, "Universal guidance for diffusion
    models"). A null class adds nothing.

    classifier: a TorchScript file, images (B, C, H, W) in [-1, 1] -> logits (B, K), or a tuple that ends with them.
    """

    classifier: str

    @property
    def looks_at_x_0_hat(self) -> bool:
        return True

    def log_potential(self, x_t: Tensor, x_0_hat: Tensor, level: Level, condition: Tensor | None) -> Tensor:
        network = TorchScript(self.classifier, 1, "a classifier: images (B, C, H, W) in [-1, 1] -> logits (B, K)")
        return log_probability(last(network(x_0_hat)), condition, self.classifier)


def log_probability(logits: Tensor, label: Tensor | None, name: str) -> Tensor:
    """log p(label), (B,); 0 for labels that are none of the K classes. logits: (B, K); label: (B,) int64."""
    if label is None:
        raise UserError(f"guidance by the classifier {name} needs a label, and the samples have no condition")
    if label.dim() != 1 or label.is_floating_point():
        raise UserError(
            f"guidance by the classifier {name} needs labels (B,) int64 as the condition, not {tuple(label.shape)}"
        )
    if logits.dim() != 2 or len(logits) != len(label):
        raise UserError(f"{name} returns {tuple(logits.shape)}; a classifier returns logits ({len(label)}, K)")
    known = (label >= 0) & (label < logits.shape[1])
    # Rows without a class are made harmless before the softmax: whatever is in them, their gradient is 0, not nan.
    safe = torch.where(known[:, None], logits, 0.0).log_softmax(1)
    log_p = safe.gather(1, torch.where(known, label, 0)[:, None])[:, 0]
    return torch.where(known, log_p, 0.0)


@dataclass(frozen=True)
class SimilarityGuidance(GradientGuidance):
    """log h = cosine similarity of the codes of an image and of a reference (Su, eq. 9.11-9.15; Liu et al. 2023, "More
    control for free").

    image_encoder: a TorchScript file, images (B, C, H, W) -> codes (B, D), or a tuple that starts with them.
    reference_encoder: a TorchScript file, reference (1, ...) -> code (1, D), likewise; it may be the same file.
    reference: a picture, shown in [-1, 1], or a .npy file of one array (an image, tokens), shown as it is.
    clean: the image is x_0_hat(x_t), and the gradient goes through the denoiser; otherwise it is x_t, and the encoder
    must know noisy images.
    """

    image_encoder: str
    reference_encoder: str
    reference: str
    clean: bool = True

    @property
    def looks_at_x_0_hat(self) -> bool:
        return self.clean

    def log_potential(self, x_t: Tensor, x_0_hat: Tensor, level: Level, condition: Tensor | None) -> Tensor:
        image = x_0_hat if self.clean else x_t
        encoder = TorchScript(self.image_encoder, 1, "an encoder: images (B, C, H, W) -> codes (B, D)")
        code = first(encoder(image)).flatten(1)
        wanted = _code_of(self.reference_encoder, self.reference, image.shape[1], image.device)
        if wanted.shape[1] != code.shape[1]:
            raise UserError(
                f"{self.image_encoder} and {self.reference_encoder} do not belong together: their codes have "
                f"{code.shape[1]} and {wanted.shape[1]} numbers"
            )
        return torch.nn.functional.cosine_similarity(code, wanted.to(code.dtype))


@cache
def _code_of(encoder: str, reference: str, channels: int, device: torch.device) -> Tensor:
    """(1, D)"""
    network = TorchScript(encoder, 1, "an encoder: reference (1, ...) -> code (1, D)")
    with torch.no_grad():
        return first(network(read_reference(reference, channels).to(device))).flatten(1)
