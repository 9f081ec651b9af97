"""Lengths of averages made after training: equal to those that were kept, and near to what would have been."""

import numpy as np
import pytest

from diffusion_trainer.training.ema import PowerFunction, gamma_of
from diffusion_trainer.training.posthoc_ema import Shares, factors

BATCH = 10


def course(steps: int, relative_stds, every: int):
    """Averages of a wandering weight, by (images seen, standard deviation), at multiples of `every` steps."""
    noise = np.random.default_rng(0)
    weight, averages, found = np.zeros(500), {s: np.zeros(500) for s in relative_stds}, {}
    for n in range(steps):
        weight = weight + noise.normal(0, 1, 500) * 100 / (100 + n)
        for s in relative_stds:
            decay = PowerFunction(s).decay(n * BATCH, BATCH)
            averages[s] = decay * averages[s] + (1 - decay) * weight
            if (n + 1) % every == 0:
                found[(n + 1) * BATCH, s] = averages[s].copy()
    return found


def integral(a: Shares, b: Shares) -> float:
    end = min(a.images_seen, b.images_seen)
    t = (np.arange(200_000) + 0.5) / 200_000 * end
    density = lambda s: (s.gamma + 1) / s.images_seen * (t / s.images_seen) ** s.gamma  # noqa: E731
    return float((density(a) * density(b)).sum() * end / 200_000)


@pytest.mark.parametrize("a", [Shares(300, 6.9), Shares(100, 2.0)])
@pytest.mark.parametrize("b", [Shares(300, 17.0), Shares(250, 0.5)])
def test_overlaps_are_the_integrals(a, b):
    assert a.overlap(b) == pytest.approx(integral(a, b), rel=1e-6)
    assert b.overlap(a) == a.overlap(b)


def test_what_was_kept_is_found_again():
    kept = [Shares(t, gamma_of(s)) for t in (100, 200, 300) for s in (0.05, 0.1)]
    for i, wanted in enumerate(kept):
        found = factors(kept, wanted)
        assert found == pytest.approx(np.eye(6)[i], abs=1e-6)
        assert wanted.error(kept, found) < 1e-6


@pytest.mark.parametrize("wanted", [0.06, 0.075, 0.15, 0.2])
def test_a_length_that_nobody_kept_is_near_to_what_it_would_have_been(wanted):
    steps, stds = 2000, (0.05, 0.1)
    found = course(steps, (*stds, wanted), steps // 20)
    kept = [(t, s) for t, s in found if s in stds]
    shares, end = [Shares(t, gamma_of(s)) for t, s in kept], Shares(steps * BATCH, gamma_of(wanted))
    by = factors(shares, end)
    assert by.sum() == pytest.approx(1, abs=0.02)
    made = sum(f * found[key] for f, key in zip(by, kept, strict=True))
    truth = found[steps * BATCH, wanted]
    nearest = min(np.linalg.norm(found[steps * BATCH, s] - truth) for s in stds)
    assert np.linalg.norm(made - truth) < 0.1 * nearest
    assert end.error(shares, by) < 0.1
