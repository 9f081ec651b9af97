"""Analytic-DPM: the optimal reverse variance of a trained model, from statistics of it (Bao, Li, Zhu and Zhang
2022).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion_trainer.process.decoders import DiscretizedGaussian
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.variances import Estimate, PosteriorVariance

TINY = 1e-20


class Statistics(NamedTuple):
    """E|x_0 - x_0_hat|^2 of a model at noise levels of ascending log-SNR.

    It is E[Var[x_0 | x_t]] where the model's mean is exact, (sigma / alpha)^2 (1 - E|eps_hat|^2 / D) (theorem 1 and
    eq. 8), and the optimal variance for the mean as it is where it is not (Bao et al. 2022b, theorem 3).
    """

    log_snr: Tensor  # (K,) float64
    error: Tensor  # (K, C, H, W) float64, entry by entry
    about: dict  # which model: checkpoint, weights, ...
    decoding: Tensor | None = None  # (K,) float64, nats per dimension: what the data then cost; older files have none

    def at(self, log_snr: Tensor, diagonal: bool) -> Tensor:
        """(N,), or (N, C, H, W) entry by entry, at log-SNRs (N,).

        Linear between the logarithms, which are nearly linear (the error tends to 1 / SNR); constant beyond the ends.
        """
        table = self.error if diagonal else self.error.flatten(1).mean(1)
        # Entries that are the same in all images are estimated without error.
        return self._between(table.clamp(min=TINY).log(), log_snr).exp()

    def cost_of_decoding(self, log_snr: Tensor) -> Tensor:
        """(N,) nats per dimension at log-SNRs (N,): `DiscretizedGaussian` with the mean error as its variance, as it
        was measured; where it was not, as it is where errors are normal and no pixel is at the ends of the range.
        """
        if self.decoding is None:
            return DiscretizedGaussian().expected_cost(self.at(log_snr, diagonal=False))
        return self._between(self.decoding, log_snr)

    def _between(self, table: Tensor, log_snr: Tensor) -> Tensor:
        """(K, ...) -> (N, ...): linear in the log-SNR, constant beyond the ends."""
        place = torch.searchsorted(self.log_snr, log_snr.double()).clamp(1, len(self.log_snr) - 1)
        low, high = self.log_snr[place - 1], self.log_snr[place]
        share = ((log_snr.double() - low) / (high - low)).clamp(0, 1)
        share = share.reshape(share.shape + (1,) * (table.dim() - 1))
        return torch.lerp(table[place - 1], table[place], share)


@lru_cache(maxsize=8)
def read(path: str) -> Statistics:
    """ValueError if the file is missing or is none that `diffusion-trainer variance` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            decoding = file.get_tensor("decoding") if "decoding" in file.keys() else None  # noqa: SIM118
            found = Statistics(file.get_tensor("log_snr"), file.get_tensor("error"), about, decoding)
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"statistics={path} cannot be read ({error}); `diffusion-trainer variance checkpoint=...` writes them"
        ) from error
    if not all(part.isfinite().all() for part in (found.log_snr, found.error, found.decoding) if part is not None):
        raise ValueError(f"statistics={path} has numbers that are not finite; measure it again, from a network that is")
    return found


def required(statistics: str | None, who: str) -> Statistics:
    """ValueError without a file."""
    if statistics is None or not Path(statistics).is_file():
        raise ValueError(
            f"{who} needs the variance statistics of the model{f' ({statistics} is missing)' if statistics else ''}: "
            "run `diffusion-trainer variance checkpoint=...` on it first"
        )
    return read(statistics)


@dataclass(frozen=True)
class Analytic(PosteriorVariance):
    """Var[x_0 | x_t] as it is on average over x_t, one number or (diagonal) one for each entry (Bao et al. 2022, eq.
    8; the diagonal is Bao et al. 2022b, theorem 2 for the mean over x_t). The optimum of the bound's KL terms, and of a
    decoder that is a normal density; of binned pixels where bins are narrow beside it, and no pixel is at the ends.

    statistics: a file that `diffusion-trainer variance` wrote; null is the checkpoint's own.
    """

    statistics: str | None = None
    diagonal: bool = False

    def at(self, t: Level, s: Level) -> Callable[[Estimate], float | Tensor]:
        log_snr = torch.tensor([t.log_snr], dtype=torch.float64)
        value = required(self.statistics, "variance=analytic").at(log_snr, self.diagonal)[0]
        value = value if self.diagonal else value.item()
        return lambda estimate: value

    def like(self, x: Tensor) -> PosteriorVariance:
        return _Moved(self, x) if self.diagonal else self


@dataclass(frozen=True)
class _Moved(PosteriorVariance):
    """Another whose estimates are tensors of the levels alone, moved when the run is planned."""

    inner: PosteriorVariance
    x: Tensor

    def at(self, t: Level, s: Level) -> Callable[[Estimate], float | Tensor]:
        value = self.inner.at(t, s)(Estimate(self.x)).to(self.x)
        return lambda estimate: value
