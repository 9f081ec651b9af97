"""How likely images are under the model, in bits per dimension; the likelihood of the probability-flow ODE."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log, pi
from typing import Any

import torch
from torch import Tensor

from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import PosteriorVariance
from diffusion_trainer.sampling.adaptive import Flow, check_reachable, check_tolerances, integrated
from diffusion_trainer.sampling.dequantization import CleanEnd, Dequantization
from diffusion_trainer.sampling.runge_kutta import Point, in_flow
from diffusion_trainer.sampling.solvers import Noise


class Likelihood(ABC):
    def check(self, precision: torch.dtype) -> None:  # noqa: B027 (the bound can)
        """UserError if the method cannot work with estimates that are rounded to that."""

    @property
    def num_images(self) -> int:
        """On how many images it must be fitted to the model before it is asked, at most; 0: it learns nothing."""
        return 0

    def fitted(
        self, denoiser: Denoiser, schedule: Schedule, pixels: Tensor, condition: Tensor | None, seed: int
    ) -> "Likelihood":
        """What is asked, a function of the arguments alone. pixels: (N, C, H, W) uint8, N up to num_images."""
        return self

    @property
    def learned(self) -> Mapping[str, Any]:
        """What was fitted, for a report: numbers and lists of them."""
        return {}

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        variance: PosteriorVariance,
        pixels: Tensor,
        condition: Tensor | None,
        noise: Noise,
    ) -> dict[str, Tensor]:
        """pixels: (B, C, H, W) uint8; noise() -> the next standard normal of that shape, in the dtype that the denoiser
        takes: the only randomness, so that with `SampleNoise` image i has its own.

        (B,) float64 terms in bits per dimension, and their sum "bits_per_dim": in expectation over the noise an upper
        bound of -log2 P(pixels) / dimensions. ValueError for pixels that are not uint8 and for parts that do not go
        together, UserError if the network's estimates are not finite.
        """


def in_bits_per_dim(nats: dict[str, Tensor], dim: int, pair: str) -> dict[str, Tensor]:
    """Terms (B,) in nats of `dim` dimensions -> the same in bits per dimension, and their sum. pair: the names of
    likelihood and schedule.
    """
    terms = {name: value / (dim * log(2)) for name, value in nats.items()}
    total = torch.stack(list(terms.values())).sum(0)
    good = total.isfinite()
    if not good.all():
        raise UserError(
            f"the likelihoods of {int((~good).sum())} of {len(good)} samples are not finite ({pair}): the network "
            "returns inf or NaN. Look at the loss of its training; precision=fp32 tells an overflow from weights that "
            "are broken"
        )
    return {**terms, "bits_per_dim": total}


def pair_of(likelihood: Likelihood, schedule: Schedule) -> str:
    return f"{type(likelihood).__name__} on {type(schedule).__name__}"


@dataclass(frozen=True)
class FlowLikelihood(Likelihood):
    """The likelihood of the probability-flow ODE (Song et al. 2021b, section 4.3 and eq. 39; Grathwohl et al. 2019).

    With p = sigma / (alpha + sigma) and z = x / (alpha + sigma) the ODE of every schedule is dz/dp = eps_hat - x_0_hat
    = (z - x_0_hat) / p =: u(z, p), finite at both ends; there

        log p(x_0) = log N(z_T; 0, p_T^2 I) + integral of div u dp from p_min to p_T + D log(1 - p_min),

    where x at the cleanest time is taken for alpha x_0, as z = (1 - p_min) x_0 says, and the prior is what samplers
    start from. Estimates of x_0 are not clipped: the divergence would not be that of the network.

    div u is estimated with `probes` random sign vectors (Hutchinson 1990), the same along the whole path: unbiased for
    log p. 0 probes stand for the exact divergence by D backward passes, affordable in low dimension only. dopri5
    keeps its error within atol + rtol |.|, as a root mean square over the batch: so a sample's number depends on its
    company, by about the tolerance.
    """

    dequantization: Dequantization
    probes: int = 1
    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self):
        if self.probes < 0:
            raise ValueError(f"probes must be at least 1, or 0 for the exact divergence, not {self.probes}")
        check_tolerances(self.rtol, self.atol)

    def check(self, precision):
        check_reachable(self.rtol, self.atol, precision)

    @property
    def num_images(self):
        return self.dequantization.num_images

    def fitted(self, denoiser, schedule, pixels, condition, seed):
        clean = CleanEnd(schedule.level_at(schedule.t_range[0]), denoiser, condition)
        return replace(self, dequantization=self.dequantization.fitted(clean, pixels, seed))

    @property
    def learned(self):
        return self.dequantization.learned

    def __call__(self, denoiser, schedule, variance, pixels, condition, noise):
        """Terms: "prior", "flow" and "dequantization" (log q). `variance` is unused: a flow has no reverse variance."""
        clean = CleanEnd(schedule.level_at(schedule.t_range[0]), denoiser, condition)
        x_0, log_q = self.dequantization(pixels, clean, noise())
        nats = self.terms(denoiser, schedule, x_0, condition, noise)
        return in_bits_per_dim({**nats, "dequantization": log_q}, x_0[0].numel(), pair_of(self, schedule))

    def terms(
        self, denoiser: Denoiser, schedule: Schedule, x_0: Tensor, condition: Tensor | None, noise: Noise
    ) -> dict[str, Tensor]:
        """x_0: (B, ...), real-valued, handed to the denoiser in its dtype -> "prior" and "flow", (B,) float64 in nats;
        their sum is -log p(x_0).
        """
        self.check(denoiser.precision)
        flow, pair = Flow(schedule, *levels(schedule, schedule.t_range)), pair_of(self, schedule)
        p_min, p_T, dim = in_flow(flow.start).u, in_flow(flow.end).u, x_0[0].numel()
        probes = self._probes(x_0, noise)

        def rate(point: Point, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return _velocity_and_divergence(denoiser, point, state[0], condition, probes, x_0.dtype, pair)

        start = (1 - p_min) * x_0.double(), torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
        with torch.no_grad():
            z_T, divergence = integrated(rate, start, flow, self.rtol, self.atol, x_0.dtype, x_0.device)
        prior = (z_T / p_T).square().flatten(1).sum(1) / 2 + dim * (log(2 * pi) / 2 + log(p_T))
        return {"prior": prior, "flow": -divergence - dim * log(1 - p_min)}

    def _probes(self, x_0: Tensor, noise: Noise) -> Tensor:
        """(n, B or 1, ...) float64, such that sum_i v_i^T J v_i estimates, or is, the trace of J."""
        if self.probes == 0:
            dim = x_0[0].numel()
            return torch.eye(dim, dtype=torch.float64, device=x_0.device).reshape(dim, 1, *x_0.shape[1:])
        signs = [torch.where(noise() >= 0, 1.0, -1.0).double() for _ in range(self.probes)]
        return torch.stack(signs) / self.probes**0.5


def _velocity_and_divergence(
    denoiser: Denoiser, point: Point, z: Tensor, condition: Tensor | None, probes: Tensor, dtype: torch.dtype, pair: str
) -> tuple[Tensor, Tensor]:
    """z: (B, ...) float64; the denoiser works in `dtype` -> u (B, ...) and div u (B,), float64."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x = point.scale * z
        u = (z - denoiser(x.to(dtype), point.level, condition).x_0_hat.double()) / point.u
        if not u.isfinite().all():  # p.item() has waited for the device already
            raise UserError(
                f"the network's estimates are not finite at t={point.level.t:.4g} ({pair}): look at the loss of its "
                "training"
            )
        divergence = z.new_zeros(len(z))
        for probe in probes:
            (pulled,) = torch.autograd.grad(u, z, probe.expand_as(z), retain_graph=True)
            divergence = divergence + (pulled * probe).flatten(1).sum(1)
    return u.detach(), divergence.detach()
