"""Variational dequantization: q_phi is fitted to the model (Ho et al. 2019, Flow++, section 3.1), with few parameters.

phi maximises E_q[log p(x_0) - log q_phi(x_0 | pixels)]. With x_0 a function of phi and of noise, its gradient is that
of E[score(x_0) . x_0 - log q_phi(x_0 | pixels)] with the score held still, and the score at the clean level is the
network's own: no ODE is solved, and none differentiated. The density of the flow has just this score if the network is
an exact denoiser. If it is not, phi is not quite the best for that density, and the bound holds all the same: it does
for any q.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Generator, Tensor

from diffusion_trainer.conventions import UserError, seed_of
from diffusion_trainer.sampling.dequantization import HALF_BIN, CleanEnd, CutNormal, Dequantization, centres

SCALES = log(0.001), log(10.0)  # of half a bin: a point, and all but uniform
REACH = 5  # scales that a location may lie outside of its bin: float64 still knows the tail there to 1e-9
BETAS = (0.9, 0.95)  # of Adam: gradients shrink a hundredfold on the way
DTYPE = torch.float32  # of what the denoiser is given, as `SampleNoise` draws


@dataclass(frozen=True)
class FittedDequantization(Dequantization):
    """q is a normal of a location and a scale of its own for each entry, cut to its bin; in units of half a bin

        location = offset + gain (x_0_hat - centre),    scale = exp(log_scale),

    where x_0_hat is the network's estimate at the centres of the bins: that of a pixel knows of all others.
    """

    offset: Tensor  # (3, C) float64 on the CPU, as the others: for black, grey and white pixels, by channel
    gain: Tensor
    log_scale: Tensor
    about: dict[str, int | float]  # how it was fitted

    @property
    def learned(self):
        numbers = {"offset": self.offset, "gain": self.gain, "scale": self.log_scale.exp()}
        return {**self.about, "for": ["black", "grey", "white"], **{k: v.tolist() for k, v in numbers.items()}}

    def __call__(self, pixels, clean, normal):
        middle = centres(pixels)
        pull = clean.pull(middle, normal.dtype) / HALF_BIN
        phi = [values.to(pixels.device) for values in (self.offset, self.gain, self.log_scale)]
        law = _law(phi, pixels, pull)
        offset = law.quantile(normal.double())
        return (middle + HALF_BIN * offset).to(normal.dtype), law.log_density(offset).flatten(1).sum(1)


@dataclass(frozen=True)
class VariationalDequantization(Dequantization):
    """How q_phi is fitted: Adam, from a step size `lr` linearly to 0, on the first num_images images.

    It begins as the normal around the pixel of `TruncatedNormalDequantization`. Its noise is not that of the bound.
    """

    num_images: int = 256
    num_steps: int = 200
    batch_size: int = 64
    lr: float = 0.1

    def __post_init__(self):
        if min(self.num_images, self.num_steps, self.batch_size) < 1:
            raise ValueError(
                f"num_images={self.num_images}, num_steps={self.num_steps} and batch_size={self.batch_size} must be "
                "positive"
            )
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr must lie in (0, 1] (it is a step of the logarithm of a scale), not {self.lr}")

    def __call__(self, pixels, clean, normal):
        raise ValueError("a variational dequantization is fitted to a model before it is used: call fitted()")

    def fitted(self, clean, pixels, seed):
        parts = torch.arange(len(pixels)).split(self.batch_size)
        pull = torch.cat([_pull(*_chosen(clean, pixels, part)) for part in parts])
        unit = _root_mean_square(pull, pixels)
        phi = _start(clean, pixels)
        optimizer = torch.optim.Adam(phi, self.lr, betas=BETAS)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.num_steps)
        for step in range(self.num_steps):
            numbers = torch.arange(step * self.batch_size, (step + 1) * self.batch_size) % len(pixels)
            normal, mine = _noise(pixels, numbers, seed, step), pull[numbers.to(pull.device)]
            optimizer.zero_grad()
            with torch.enable_grad():
                offset, gain, log_scale = phi
                _cost((offset, gain / unit, log_scale), *_chosen(clean, pixels, numbers), mine, normal).backward()
            optimizer.step()
            decay.step()
            phi[2].data.clamp_(*SCALES)
        offset, gain, log_scale = (values.detach() for values in phi)
        about = {"num_images": len(pixels), "num_steps": self.num_steps, "seed": seed}
        return FittedDequantization(offset.cpu(), (gain / unit).cpu(), log_scale.cpu(), about)


def _start(clean: CleanEnd, pixels: Tensor) -> list[Tensor]:
    """Offset, gain (of pulls whose root mean square is 1, so that one step size does for all) and log scale."""
    zeros = torch.zeros(3, pixels.shape[1], dtype=torch.float64, device=pixels.device)
    scale = min(max(log(clean.scale / HALF_BIN), SCALES[0]), SCALES[1])
    return [values.requires_grad_() for values in (zeros.clone(), zeros.clone(), zeros + scale)]


def _pull(clean: CleanEnd, pixels: Tensor) -> Tensor:
    """From the centres of the bins, in half bins; (B, C, ...) float64."""
    return clean.pull(centres(pixels), DTYPE) / HALF_BIN


def _root_mean_square(pull: Tensor, pixels: Tensor) -> Tensor:
    """(3, C) float64: by kind and channel. 1 where there are no such pixels."""
    kind, channel = _places(pixels)
    squares, count = (torch.zeros(3, pixels.shape[1], dtype=pull.dtype, device=pull.device) for _ in range(2))
    where = kind, channel.expand_as(kind)
    squares.index_put_(where, pull.square(), accumulate=True)
    count.index_put_(where, torch.ones_like(pull), accumulate=True)
    found = (squares / count.clamp(min=1)).sqrt()
    return torch.where(found > 0, found, 1.0)


def _noise(pixels: Tensor, numbers: Tensor, seed: int, step: int) -> Tensor:
    """Standard normal for the chosen images, float64; drawn on the CPU, so that a GPU has the same."""
    generator = Generator().manual_seed(seed_of(seed, "dequantization", step))
    drawn = torch.randn(len(numbers), *pixels.shape[1:], generator=generator, dtype=torch.float64)
    return drawn.to(pixels.device)


def _chosen(clean: CleanEnd, pixels: Tensor, numbers: Tensor) -> tuple[CleanEnd, Tensor]:
    numbers = numbers.to(pixels.device)
    condition = None if clean.condition is None else clean.condition[numbers]
    return CleanEnd(clean.level, clean.denoiser, condition), pixels[numbers]


def _cost(phi: Sequence[Tensor], clean: CleanEnd, pixels: Tensor, pull: Tensor, normal: Tensor) -> Tensor:
    """() whose gradient estimates that of E_q[log q - log p] in nats per dimension.

    log q depends on phi through x_0 alone: the mean of the rest is 0, and so the gradient of each draw vanishes where q
    is the posterior (Roeder et al. 2017, section 3).
    """
    law = _law(phi, pixels, pull)
    offset = law.quantile(normal)
    log_q = CutNormal(law.location.detach(), law.scale.detach()).log_density(offset)
    x_0 = centres(pixels) + HALF_BIN * offset
    score = clean.pull(x_0.detach(), DTYPE) / clean.scale**2
    if not score.isfinite().all():
        raise UserError(
            f"the network's estimates are not finite at t={clean.level.t:.4g}, where VariationalDequantization is "
            "fitted to them: look at the loss of its training"
        )
    return (log_q - score * x_0).mean()


def _places(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each entry of pixels (B, C, ...): 0, 1, 2 for black, grey, white; and its channel, to be broadcast."""
    kind = (pixels > 0).long() + (pixels == 255).long()
    return kind, torch.arange(pixels.shape[1], device=pixels.device).reshape(-1, *[1] * (pixels.dim() - 2))


def _law(phi: Sequence[Tensor], pixels: Tensor, pull: Tensor) -> CutNormal:
    """q of each entry, of pixels and pulls (B, C, ...), these float64 in half bins."""
    offset, gain, log_scale = (values[_places(pixels)] for values in phi)
    scale = log_scale.exp()
    reach = 1 + REACH * scale
    return CutNormal((offset + gain * pull).clamp(-reach, reach), scale)
