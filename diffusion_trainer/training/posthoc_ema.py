"""Averages of lengths that nobody kept, made after training from snapshots of those that were: the combination of
snapshots whose shares of the past weights are nearest to the wanted ones (Karras et al. 2024, EDM2, section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.checkpoints import Checkpoint


@dataclass(frozen=True)
class Shares:
    """How much of the weights of each time an average holds: (gamma + 1) t^gamma / images_seen^(gamma + 1), up to it.

    Summed over a step these are exactly `PowerFunction`'s.
    """

    images_seen: int
    gamma: float

    def overlap(self, other: "Shares") -> float:
        """The integral of the product of both over t (EDM2, algorithm 3; derived there for images counted in ours)."""
        a, b = sorted((self, other), key=lambda shares: shares.images_seen)
        return (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * _ratio(a, b) / b.images_seen

    def error(self, kept: Sequence["Shares"], factors: np.ndarray) -> float:
        """Distance of the combination from these shares, relative to their norm (both in L2 over t)."""
        gram, wanted = _products(kept, self)
        square = self.overlap(self) - 2 * factors @ wanted + factors @ gram @ factors
        return float(np.sqrt(max(square, 0) / self.overlap(self)))


def _ratio(early: Shares, late: Shares) -> float:
    return (early.images_seen / late.images_seen) ** late.gamma


def _products(kept: Sequence[Shares], wanted: Shares) -> tuple[np.ndarray, np.ndarray]:
    gram = np.array([[a.overlap(b) for b in kept] for a in kept])
    return gram, np.array([a.overlap(wanted) for a in kept])


def factors(kept: Sequence[Shares], wanted: Shares) -> np.ndarray:
    """(n,) by which to sum the kept averages: least squares over their shares (EDM2, algorithm 3)."""
    gram, products = _products(kept, wanted)
    scale = 1 / np.sqrt(np.diag(gram))  # shares of early times are large: all of norm one are better conditioned
    found, *_ = np.linalg.lstsq(gram * scale[:, None] * scale, products * scale, rcond=1e-12)
    return found * scale


class Combination:
    """Reads as a checkpoint with one kind of tensors, the weighted sum of those of other checkpoints."""

    def __init__(self, parts: Sequence[tuple[Checkpoint, str]], by: Sequence[float]):
        self.parts, self.by = parts, by
        self.shapes = parts[0][0].shapes
        for checkpoint, _ in parts:
            if checkpoint.shapes != self.shapes:
                raise UserError(f"{checkpoint.folder} is of another architecture than {parts[0][0].folder}")

    def read(self, kind: str, name: str, first: int, count: int) -> Tensor:
        """(count,) elements of the flattened parameter, summed in float64."""
        total = torch.zeros(count, dtype=torch.float64)
        for (checkpoint, own), factor in zip(self.parts, self.by, strict=True):
            total += factor * checkpoint.read(own, name, first, count).double()
        return total.float()
