"""The variational bound of -log p(x_0), term by term."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_trainer.process.decoders import Decoder, DiscretizedGaussian
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import Estimate, PosteriorVariance, ReverseStep
from diffusion_trainer.sampling.dequantization import centres
from diffusion_trainer.sampling.grids import Grid
from diffusion_trainer.sampling.likelihood import Likelihood, in_bits_per_dim, pair_of
from diffusion_trainer.sampling.solvers import Noise


class BoundTerms(NamedTuple):
    """Nats, float64, whose sum bounds -log p(x_0) from above in expectation over the noise (Ho et al. 2020, eq. 5)."""

    prior: Tensor  # (B,), L_T
    diffusion: Tensor  # (B, num_steps - 1), the L_k from the noisy end to the clean one
    decoder: Tensor  # (B,), L_0


@dataclass(frozen=True)
class VariationalBound(Likelihood):
    """The bound of the sampler with this grid, ancestral steps and this reverse variance (Ho et al. 2020, eq. 5 and 12;
    Kingma et al. 2021, eq. 11). Exact up to one draw of x_t for each term.

    prior: KL(q(x_T | x_0) || N(0, sigma_T^2 I)), from which samplers start. diffusion: the KL terms between the
    neighbouring times of the grid. decoder: around x_0_hat at its last positive time, with the variance of the step to
    0, that is Var[x_0 | x_t]; where that is 0 (beta-tilde), with that of the step before, as in Ho et al.'s code.
    `x_0_bound` clips each estimate as the sampler does; null leaves it as it is.
    """

    grid: Grid
    num_steps: int
    decoder: Decoder
    x_0_bound: float | None = 1.0

    def __post_init__(self):
        if self.num_steps < 2:
            raise ValueError(f"num_steps must be at least 2 (one of them is the decoder), not {self.num_steps}")
        if self.x_0_bound is not None and not self.x_0_bound > 0:
            raise ValueError(f"x_0_bound must be positive or null, not {self.x_0_bound}")

    def __call__(self, denoiser, schedule, variance, pixels, condition, noise):
        """Terms: "prior", "diffusion" and "decoder". ValueError for a decoder that is not that of 8-bit pixels."""
        if self.decoder != DiscretizedGaussian():
            raise ValueError(f"8-bit pixels have 256 levels: use DiscretizedGaussian(levels=256), not {self.decoder}")
        first = noise()  # also tells the dtype that the denoiser takes
        x_0 = centres(pixels).to(first.dtype)
        terms = self.terms(denoiser, schedule, variance, x_0, condition, _starting_with(first, noise))
        nats = {"prior": terms.prior, "diffusion": terms.diffusion.sum(1), "decoder": terms.decoder}
        return in_bits_per_dim(nats, x_0[0].numel(), pair_of(self, schedule))

    @torch.no_grad()
    def terms(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        variance: PosteriorVariance,
        x_0: Tensor,
        condition: Tensor | None,
        noise: Noise,
    ) -> BoundTerms:
        """x_0: (B, ...) in the network's space. noise() -> the next standard normal like x_0; one for each of the
        num_steps times, from the noisy end.
        """
        at = levels(schedule, self.grid(schedule, self.num_steps))
        truth, diffusion = x_0.double(), []
        for t, s in pairwise(at[:-1]):
            estimate = self._estimate(denoiser, t, x_0, condition, noise)
            step = ReverseStep.of(t, s)
            reverse = _like(step.variance(variance.at(t, s)(estimate)), truth)
            diffusion.append(_kl(step, truth - estimate.x_0_hat.double(), reverse))
        prior = (at[0].alpha / at[0].sigma * truth).square().flatten(1).sum(1) / 2
        last = self._estimate(denoiser, at[-2], x_0, condition, noise)
        final = _like(variance.at(at[-2], at[-1])(last), truth)
        decoded = self.decoder(truth, last.x_0_hat.double(), torch.where(final > 0, final, reverse))
        return BoundTerms(prior, torch.stack(diffusion, 1), -decoded)

    def _estimate(self, denoiser: Denoiser, t: Level, x_0: Tensor, condition: Tensor | None, noise: Noise) -> Estimate:
        """Of x_t ~ q(x_t | x_0)."""
        estimate = denoiser(torch.add(t.alpha * x_0, noise(), alpha=t.sigma), t, condition)
        if self.x_0_bound is None:
            return estimate
        return estimate.clipped_visibly(self.x_0_bound)


def _kl(step: ReverseStep, error: Tensor, variance: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x_0) || N(., variance)), (B,): the means differ by of_x_0 times the error x_0 - x_0_hat."""
    ratio = step.kept / variance
    each = ratio - 1 - ratio.log() + (step.of_x_0 * error) ** 2 / variance
    return each.flatten(1).sum(1) / 2


def _like(value: float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _starting_with(first: Tensor, noise: Noise) -> Noise:
    ahead = [first]
    return lambda: ahead.pop() if ahead else noise()
