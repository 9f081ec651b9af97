"""Learned uncertainty: each noise level's loss is divided by what it is on average (Karras et al. 2024, EDM2)."""

from math import pi

import torch
from torch import Tensor, nn

from diffusion_trainer.conventions import Draws
from diffusion_trainer.objectives.base import LossTerms, Network
from diffusion_trainer.objectives.denoising import AroundDenoising, Denoising
from diffusion_trainer.process.variances import PosteriorVariance


class Uncertainty(nn.Module):
    """u(c_noise), (B,) -> (B,): a linear layer, zero at first, on random Fourier features (EDM2, appendix B.4)."""

    def __init__(self, features: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # the same for all: not in checkpoints
        self.register_buffer("frequencies", 2 * pi * torch.randn(features, generator=generator), persistent=False)
        self.register_buffer("phases", 2 * pi * torch.rand(features, generator=generator), persistent=False)
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, c_noise: Tensor) -> Tensor:
        waves = 2**0.5 * (c_noise[:, None].float() * self.frequencies + self.phases).cos()
        return self.linear(waves).squeeze(1)


class LearnedUncertainty(AroundDenoising):
    """loss / exp(u) + u, u a learned function of the noise level (Karras et al. 2024, eq. 14-15).

    At the minimum exp(u) is the mean loss of the level, so that all levels pull alike whatever the weighting.
    """

    def __init__(self, denoising: Denoising, features: int = 128):
        if features < 1:
            raise ValueError(f"features must be positive, not {features}")
        if denoising.timesteps.observes:
            raise ValueError(
                "LearnedUncertainty evens out the losses that timesteps=loss_second_moment would follow; use "
                "timesteps=stratified"
            )
        if denoising.schedule.learned:
            raise ValueError("LearnedUncertainty changes the bound that schedule=learned needs; use another schedule")
        self.denoising, self.uncertainty = denoising, Uncertainty(features)

    @property
    def second(self) -> type[PosteriorVariance] | None:
        return None

    @property
    def learned(self) -> tuple[nn.Module, ...]:
        return (self.uncertainty,)

    def __call__(self, network: Network, x_0: Tensor, condition: Tensor | None, draws: Draws) -> LossTerms:
        p = self.denoising.run(network, x_0, condition, draws)
        terms = self.denoising.terms(p)
        u = self.uncertainty(p.coefficients.noise)
        unweighted = terms.loss / p.importance
        return terms._replace(loss=p.importance * (unweighted / u.exp() + u))
