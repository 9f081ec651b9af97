"""The hybrid objective: the mean by the denoising loss, the variance by the bound (Nichol and Dhariwal 2021)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_trainer.conventions import Draws, expand
from diffusion_trainer.objectives.base import LossTerms, Network
from diffusion_trainer.objectives.denoising import AroundDenoising, Denoising, Pass
from diffusion_trainer.process.decoders import DiscretizedGaussian
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.variances import Estimate, Learned, PosteriorVariance, ReverseStep


@dataclass(frozen=True)
class Hybrid(AroundDenoising):
    """L + vlb_weight L_vlb (Nichol and Dhariwal 2021, eq. 16), L_vlb being the sum of num_timesteps terms in nats per
    dimension, of which each sample has one. L_vlb teaches the second output alone: the mean in it has no gradient.

    The first step is the decoder of 8-bit images (Ho et al. 2020, eq. 13); as t is continuous, it is that of all t
    below one and a half steps. The paper's lambda of 0.001 counts bits.
    """

    of_pixels: ClassVar[bool] = True
    denoising: Denoising
    vlb_weight: float = 0.001
    num_timesteps: int = 1000

    def __post_init__(self):
        if not self.vlb_weight > 0 or self.num_timesteps < 2:
            raise ValueError(
                "vlb_weight must be positive and num_timesteps at least 2, not "
                f"{self.vlb_weight} and {self.num_timesteps}"
            )
        if self.denoising.schedule.learned:
            raise ValueError("Hybrid adds a term that a learned schedule must not lower; use a schedule that is fixed")

    @property
    def second(self) -> type[PosteriorVariance]:
        return Learned

    def __call__(self, network: Network, x_0: Tensor, condition: Tensor | None, draws: Draws) -> LossTerms:
        p = self.denoising.run(network, x_0, condition, draws)
        terms = self.denoising.terms(p)
        bound = self.num_timesteps * self.bound_term(p)
        return terms._replace(loss=terms.loss + p.importance * self.vlb_weight * bound)

    def bound_term(self, p: Pass) -> Tensor:
        """(B,), nats per dimension: KL(q(x_s | x_t, x_0) || p(x_s | x_t)), or the decoder's where s is 0."""
        times, length = p.level.t.double(), 1 / self.num_timesteps
        later = times - length
        later = torch.where(later < length / 2, 0, later)
        t, s = self._level(times, p.x_0), self._level(later, p.x_0)
        step, estimate = ReverseStep.of(t, s), Estimate(p.x_0_hat.detach(), p.second.double())
        variance = Learned().of_step(t, s)(estimate)
        ratio = step.kept / variance
        difference = step.of_x_0 * (p.x_0.double() - estimate.x_0_hat.double())
        # Where s is 0, kept is 0 and its logarithm is not taken: the other branch counts.
        kl = (ratio - 1 - ratio.clamp(min=torch.finfo(ratio.dtype).tiny).log() + difference**2 / variance) / 2
        decoder = -DiscretizedGaussian()(p.x_0.double(), estimate.x_0_hat.double(), variance) / p.x_0[0].numel()
        return torch.where(s.sigma.flatten() > 0, kl.flatten(1).mean(1), decoder).float()

    def _level(self, times: Tensor, like: Tensor) -> Level:
        """Of times (B,), in shapes that broadcast to `like`, (B, ...); float64."""
        return Level(*(expand(value, like.double()) for value in self.schedule.level(times)))
