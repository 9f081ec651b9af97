"""The page to read first: names, ranges and shapes that every other file obeys.

Time and process
    t         in [0, 1], (B,) or scalar. **t = 0 is data, t = 1 is noise.** Step k of T of a discrete DDPM is t = k/T.
    alpha(t), sigma(t)     x_t = alpha(t) * x_0 + sigma(t) * eps,  eps ~ N(0, I). alpha is never its square.
    log_snr   log(alpha^2 / sigma^2). DPM-Solver's lambda is half of it: we say half_log_snr.
    s         the time that follows t in sampling: s < t.

Tensors
    x_0, x_t, eps, score   (B, ...); images in the network's space are float in [-1, 1], (B, C, H, W).
    x_0_hat, eps_hat       estimates. A denoiser returns x_0_hat = E[x_0 | x_t].
    label                  (B,) int64, a class. The null class (no condition) is num_classes.

Progress is counted in images seen; a step is only one global batch of them. Units stand in the names
(`num_images`, `every_n_images`, `timeout_seconds`, `bits_per_dim`).

A sample's place in the endless stream of training samples is its number `index`; its place in its global batch is
`index % batch_size`. Randomness of training is a function of (seed, stream, step, place), never of the rank.
"""

import os
import sys
from hashlib import blake2b
from typing import Protocol

from torch import Tensor


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: shown as is, without traceback, exit code 2.

    The message says what was wrong, where, and what would be right.
    """

    exit_code = 2


class PassingError(UserError):
    """What another start may not meet again: a store that does not answer, a process that was killed. Shown likewise,
    but with exit code 1, after which a job goes back into the queue.
    """

    exit_code = 1


class Draws(Protocol):
    """Random numbers for the B samples that one process has of a global batch of `total` samples."""

    place: Tensor  # (B,) int64, the place of each sample in the global batch
    total: int

    def uniform(self, stream: str) -> Tensor:
        """(B,) in [0, 1). The same stream gives the same numbers again."""
        ...

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape), standard normal."""
        ...


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) or () -> (B, 1, ..., 1) or (), so that it multiplies `like` (B, ...) sample by sample; in its dtype."""
    return values.reshape(values.shape + (1,) * (like.dim() - values.dim()) if values.dim() else ()).to(like.dtype)


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on the key alone: not on the process, the platform or a library's stream."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def cores() -> int:
    """CPU cores that this process may use: a container, a job or a sweep may have given it fewer than there are."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def plain(text: str) -> str:
    """What strangers wrote, without the characters that a terminal would obey or cannot show."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
