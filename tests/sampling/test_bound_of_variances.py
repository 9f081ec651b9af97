"""Bits per dimension of 8-bit pixels under each reverse variance, by the product's own bound, with an exact mean."""

import json

import pytest
import torch
from cases import each
from configured import SCHEDULES
from exact import ExactDenoiser
from oracle import Mixture
from safetensors.torch import save_file
from solving import Noise

from diffusion_trainer.process.analytic import Analytic
from diffusion_trainer.process.decoders import DiscretizedGaussian
from diffusion_trainer.process.variances import FixedLarge, FixedSmall
from diffusion_trainer.sampling.bound import VariationalBound
from diffusion_trainer.sampling.grids import UniformTime

# Seven standard deviations from black and white, whose bins are open.
VARIANCES = torch.tensor([0.1, 0.14], dtype=torch.float64).square()
DATA = Mixture.gaussian([0.05, -0.02], VARIANCES.diag())
N = 1000


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    path, log_snr = tmp_path_factory.mktemp("bound") / "statistics", torch.linspace(-16, 20, 2001, dtype=torch.float64)
    error = VARIANCES / (1 + VARIANCES * log_snr[:, None].exp())
    save_file({"log_snr": log_snr, "error": error.contiguous()}, path, {"about": json.dumps({})})
    return str(path)


@each(
    "schedule",
    {name: SCHEDULES[name] for name in ("linear", "cosine", "rectified_flow", "vp_sde", "zero_terminal_snr")},
)
def test_bits_per_dim_of_analytic_are_never_above_those_of_beta_or_beta_tilde(schedule, statistics):
    """In 2 to 50 steps, where the decoder is wide beside a bin: it is then the density that the theorem is about."""
    x_0 = DATA.sample(N, torch.Generator().manual_seed(1))[0]
    pixels = ((x_0 + 1) * 127.5).round().to(torch.uint8)
    gaps = []
    for num_steps in (2, 3, 5, 10, 25, 50):
        bound = VariationalBound(UniformTime(), num_steps, DiscretizedGaussian(), None)
        diagonal, ours, small, large = (
            bound(ExactDenoiser(DATA), schedule, variance, pixels, None, Noise(N))["bits_per_dim"]
            for variance in (Analytic(statistics, True), Analytic(statistics), FixedSmall(), FixedLarge())
        )
        for better, worse in ((ours, small), (ours, large), (diagonal, ours)):
            assert (worse - better).mean() > -3 * (worse - better).std() / N**0.5
        gaps.append((torch.stack([small, large]).mean(1).min() - ours.mean()).item())
    assert max(gaps) > 0.05
    assert gaps[-1] < max(gaps) / 5
