"""The law of what DDIM's family draws with each reverse variance, without Monte Carlo error (`law`)."""

import json
from math import log2

import pytest
import torch
from cases import each
from configured import SCHEDULES, every_schedule
from exact import GAUSSIAN, ExactDenoiser
from oracle import Mixture
from safetensors.torch import save_file
from solving import jumped, law
from torch.testing import assert_close

from diffusion_trainer.process.analytic import Analytic
from diffusion_trainer.process.variances import Estimate, FixedLarge, FixedSmall, NoiseVariance
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.grids import UniformLogSNR
from diffusion_trainer.sampling.sampler import Sampler

VARIANCE = 0.3
ISOTROPIC = Mixture.gaussian([0.5, -1.0], VARIANCE * torch.eye(2))
every_eta = each("eta", [0.0, 0.5, 1.0])


class WithSecondOutput(ExactDenoiser):
    """Var[eps | x_t] of ISOTROPIC, as objective=npr and sn train it."""

    def __call__(self, x_t, level, condition):
        of_noise = level.alpha**2 * VARIANCE / (level.alpha**2 * VARIANCE + level.sigma**2)
        return Estimate(super().__call__(x_t, level, condition).x_0_hat, torch.full_like(x_t, of_noise))


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """What `diffusion-trainer variance` finds of ISOTROPIC, without its sampling error, at very many levels."""
    path, log_snr = tmp_path_factory.mktemp("laws") / "statistics", torch.linspace(-16, 20, 20_001, dtype=torch.float64)
    error = (VARIANCE / (1 + VARIANCE * log_snr.exp()))[:, None].expand(-1, 2).contiguous()
    save_file({"log_snr": log_snr, "error": error}, path, {"about": json.dumps({})})
    return str(path)


@every_schedule
@every_eta
def test_with_the_optimal_variance_isotropic_data_is_exact_in_any_number_of_steps(schedule, eta, statistics):
    """Analytic-DPM of one number and of one for each entry, NPR and SN; beta-tilde is not."""
    optimal = Analytic(statistics), Analytic(statistics, diagonal=True), NoiseVariance(VARIANCE)
    expected = jumped(ISOTROPIC, schedule)
    for num_steps in (2, 5):
        sampler = Sampler(DDIM(eta), UniformLogSNR(), num_steps, None)
        for variance in optimal:
            mean, covariance = law(sampler, schedule, variance, ISOTROPIC, WithSecondOutput(ISOTROPIC))
            assert_close(mean, ISOTROPIC.mean(), rtol=0, atol=1e-9)
            assert_close(covariance, expected, rtol=0, atol=1e-6)
        _, covariance = law(sampler, schedule, FixedSmall(), ISOTROPIC)
        assert (covariance - expected).abs().max() > 0.02


@each("schedule", {name: SCHEDULES[name] for name in ("zero_terminal_snr", "cosine", "edm", "linear", "sub_vp")})
@every_eta
def test_with_beta_the_law_is_met_to_first_order(schedule, eta):
    errors = []
    for num_steps in (64, 128):
        mean, covariance = law(Sampler(DDIM(eta), UniformLogSNR(), num_steps, None), schedule, FixedLarge())
        assert_close(mean, GAUSSIAN.mean(), rtol=0, atol=1e-9)
        errors.append((covariance - jumped(GAUSSIAN, schedule)).norm().item())
    assert 0.85 < log2(errors[0] / errors[1]) < 1.15
