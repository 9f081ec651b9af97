"""How far a model's x_0_hat is from x_0, and what x_0 costs given it, at every noise level: for Analytic-DPM."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import e, pi

import torch
from torch import Tensor

from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.real import images_of
from diffusion_trainer.process.analytic import TINY, Statistics
from diffusion_trainer.process.decoders import DiscretizedGaussian
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import clipped_visibly
from diffusion_trainer.sampling.noise import SampleNoise
from diffusion_trainer.sampling.solvers import Noise
from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.module import to_unit

MIN_LOG_SNR = -12.0  # below it x_t says nothing of x_0, and the error no longer changes


@dataclass(frozen=True)
class PosteriorVarianceMeasurement:
    """num_samples pairs of an image and a noise at each of num_levels noise levels, equally spaced in log-SNR.

    Sample i is the data's image i (and again from the start when there are more samples) with the noise of number i:
    the result does not depend on batches and ranks but for the order of sums. Pixels are estimated twice: what decoding
    costs depends on the mean error. For real numbers (latents) it is a function of that error alone.
    """

    num_samples: int = 4096
    num_levels: int = 200
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self):
        if self.num_samples < 2 or self.num_levels < 2 or self.batch_size < 1:
            raise ValueError("num_samples and num_levels must be at least 2, batch_size positive")

    def __call__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        data: ShardData,
        conditioning: Conditioning,
        x_0_bound: float | None,
        device: torch.device,
        agreement: Agreement,
        about: dict,
    ) -> Statistics:
        """All ranks must call it, and all get the result. x_0_bound: to which estimates are clipped, as in sampling."""
        grid = log_snr_grid(schedule, self.num_levels)
        at = levels(schedule, schedule.t_of_log_snr(grid))

        def estimated() -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
            for x_0, condition, noise in self._batches(data, conditioning, device, agreement):
                yield x_0, estimates(denoiser, at, x_0, condition, noise, x_0_bound)

        error = torch.zeros(self.num_levels, *data.image_shape, dtype=torch.float64)
        for x_0, x_0_hats in estimated():
            error += squared_errors(x_0, x_0_hats).cpu()
        error = sum(agreement.gather(error)) / self.num_samples
        if not error.isfinite().all():
            at_levels = int((~error.isfinite()).flatten(1).any(1).sum())
            raise UserError(
                f"the network returns inf or NaN at {at_levels} of {self.num_levels} noise levels, so that its errors "
                "have no mean; precision=fp32 tells an overflow from weights that are broken"
            )
        variance = error.flatten(1).mean(1).clamp(min=TINY)
        if data.batch([0])["image"].is_floating_point():
            return Statistics(grid, error, about, costs_of_real_numbers(variance))
        decoding, variance = torch.zeros(self.num_levels, dtype=torch.float64), variance.to(device)
        for x_0, x_0_hats in estimated():
            decoding += costs_of_pixels(x_0, x_0_hats, variance).cpu()
        decoding = sum(agreement.gather(decoding)) / (self.num_samples * error[0].numel())
        return Statistics(grid, error, about, decoding)

    def _batches(
        self, data: ShardData, conditioning: Conditioning, device: torch.device, agreement: Agreement
    ) -> Iterator[tuple[Tensor, Tensor | None, SampleNoise]]:
        """x_0, its condition and its noise, of this rank's samples: the same each time."""
        mine = range(agreement.rank, self.num_samples, agreement.world)
        for first in range(0, len(mine), self.batch_size):
            numbers = list(mine[first : first + self.batch_size])
            images, condition = images_of(data, [i % data.count for i in numbers], conditioning, device)
            yield to_unit(images), condition, SampleNoise(self.seed, numbers, data.image_shape, device)


def log_snr_grid(schedule: Schedule, count: int) -> Tensor:
    """(count,) float64, ascending, over the schedule's range as far as it is finite."""
    low, high = schedule.t_range
    noisy, clean = schedule.log_snr(torch.tensor([high, low], dtype=torch.float64)).tolist()
    return torch.linspace(max(noisy, MIN_LOG_SNR), clean, count, dtype=torch.float64)


@torch.no_grad()
def estimates(
    denoiser: Denoiser,
    at: Iterable[Level],
    x_0: Tensor,
    condition: Tensor | None,
    noise: Noise,
    x_0_bound: float | None,
) -> Iterator[Tensor]:
    """x_0_hat of each level, (B, C, H, W), made when it is asked for and clipped; a noise of its own for each."""
    for level in at:
        x_0_hat = denoiser(level.alpha * x_0 + level.sigma * noise(), level, condition).x_0_hat
        yield x_0_hat if x_0_bound is None else clipped_visibly(x_0_hat, x_0_bound)


def squared_errors(x_0: Tensor, x_0_hats: Iterable[Tensor]) -> Tensor:
    """(K, C, H, W) float64: sums over the batch, for each of the K estimates."""
    return torch.stack([(x_0_hat - x_0).double().square().sum(0) for x_0_hat in x_0_hats])


def costs_of_pixels(x_0: Tensor, x_0_hats: Iterable[Tensor], variance: Tensor) -> Tensor:
    """(K,) float64: sums over the batch, nats of 8-bit pixels under a normal around each of the K estimates; variance:
    (K,), of the normals.
    """
    decoder, x_0_64 = DiscretizedGaussian(), x_0.double()
    return torch.stack([-decoder(x_0_64, hat.double(), v).sum() for hat, v in zip(x_0_hats, variance, strict=True)])


def costs_of_real_numbers(variance: Tensor) -> Tensor:
    """(K,) nats per dimension: the mean of -log N(x_0; x_0_hat, variance), variance (K,) being the mean squared error.

    That is the entropy of the normal, whatever errors are distributed like; where they are small it is negative.
    """
    return (2 * pi * e * variance).log() / 2
