"""Samples by number: sample i is a function of (seed, i), and every rank calls the network equally often."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import PosteriorVariance
from diffusion_trainer.sampling.guidance import Guidance
from diffusion_trainer.sampling.noise import SampleNoise
from diffusion_trainer.sampling.sampler import Sampler


@dataclass(frozen=True)
class Generator:
    """Draws samples of `shape` with a sampler, under guidance, from a denoiser."""

    denoiser: Denoiser
    schedule: Schedule
    sampler: Sampler
    variance: PosteriorVariance
    guidance: Guidance
    shape: tuple[int, ...]  # of one sample
    device: torch.device
    seed: int

    def draw(self, samples: list[int], condition: Tensor | None) -> Tensor:
        """x_0 (len(samples), *shape) of these numbers; condition: (len(samples), ...), theirs, or None."""
        noise = SampleNoise(self.seed, samples, self.shape, self.device)
        condition = None if condition is None else condition.to(self.device)
        return self.sampler(self.guidance(self.denoiser), self.schedule, self.variance, noise(), condition, noise)

    def map(self, x_T: Tensor, condition: Tensor | None) -> Tensor:
        """x_0 (B, ...) of given x_T (B, ...), by a sampler that draws no noise; condition: (B, ...) or None."""
        condition = None if condition is None else condition.to(self.device)

        def no_noise() -> Tensor:
            raise ValueError(
                f"{type(self.sampler.solver).__name__} with the reverse variance {type(self.variance).__name__} draws "
                "noise: it is no map from x_T to x_0; choose variance=beta_tilde"
            )

        return self.sampler(self.guidance(self.denoiser), self.schedule, self.variance, x_T, condition, no_noise)

    def in_steps(self, num_steps: int) -> "Generator":
        return replace(self, sampler=replace(self.sampler, num_steps=num_steps))

    def encode(self, x_0: Tensor, condition: Tensor | None) -> Tensor:
        """x_0 -> x_T, (B, ...) both, without guidance; ValueError if the sampler draws noise."""
        condition = None if condition is None else condition.to(self.device)
        return self.sampler.encode(self.denoiser, self.schedule, x_0, condition)

    def decode(self, x_T: Tensor, condition: Tensor | None) -> Tensor:
        """The inverse of `encode`."""
        condition = None if condition is None else condition.to(self.device)
        return self.sampler.decode(self.denoiser, self.schedule, x_T, condition)

    def batches(
        self, conditions: Tensor | None, count: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """(x_0, numbers) of this rank's share of samples 0..count-1; conditions: (count, ...), on the CPU, or None.

        Ranks with less to do draw sample 0 again and drop it: under ZeRO-3 a forward pass is a collective.
        """
        share = -(-count // world)
        for first in range(0, share, batch_size):
            numbers = [rank + world * k for k in range(first, min(first + batch_size, share))]
            padded = [i if i < count else 0 for i in numbers]
            x_0 = self.draw(padded, None if conditions is None else conditions[torch.tensor(padded)])
            kept = sum(i < count for i in numbers)  # only the tail can be padding
            yield x_0[:kept], numbers[:kept]
