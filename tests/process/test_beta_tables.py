"""Beta tables: each is the discrete process that it is named after, and the tables are shared as they should be."""

import math

import pytest
import torch
from cases import each
from options import built
from torch.testing import assert_close

from diffusion_trainer.process.beta_tables import (
    BetaTable,
    ConstantBeta,
    CosineBeta,
    LinearBeta,
    QuadraticBeta,
    SigmoidBeta,
)
from diffusion_trainer.process.schedules import Cosine

TABLES = {name: table for name, table in built("schedule").items() if isinstance(table, BetaTable)}
SHORT = {type(table).__name__: type(table)(num_timesteps=50) for table in TABLES.values()}
every_table = each("schedule", {**TABLES, **SHORT})
every_dtype = each("dtype", [torch.float64, torch.float32])
RAMPS = (LinearBeta, QuadraticBeta, SigmoidBeta)


def cosine_alpha_bar(k, T, s=0.008):
    return math.cos((k / T + s) / (1 + s) * math.pi / 2) ** 2  # Nichol and Dhariwal 2021, eq. 17, less a factor


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


FORMULAS = {  # beta_k of k = 1..T with the defaults, each as its paper or code has it
    LinearBeta: lambda k, T: 1e-4 + (k - 1) / (T - 1) * (0.02 - 1e-4),
    QuadraticBeta: lambda k, T: (0.01 + (k - 1) / (T - 1) * (math.sqrt(0.02) - 0.01)) ** 2,
    SigmoidBeta: lambda k, T: 1e-4 + (0.02 - 1e-4) * sigmoid(-6 + 12 * (k - 1) / (T - 1)),
    ConstantBeta: lambda k, T: 0.02,
    CosineBeta: lambda k, T: min(1 - cosine_alpha_bar(k, T) / cosine_alpha_bar(k - 1, T), 0.999),
}


def test_there_is_a_formula_for_every_table():
    assert {type(table) for table in TABLES.values()} == set(FORMULAS)


@pytest.mark.parametrize("T", [2, 50, 1000])
@pytest.mark.parametrize("kind", FORMULAS)
def test_betas_are_the_published_ones(kind, T):
    expected = torch.tensor([FORMULAS[kind](k, T) for k in range(1, T + 1)], dtype=torch.float64)
    assert_close(kind(num_timesteps=T).betas(), expected, rtol=1e-9, atol=0)


def test_stable_diffusion_ends_with_the_signal_that_lin_et_al_found():
    """Lin et al. 2024, section 3.1: the terminal SNR of Stable Diffusion is 0.004682, sqrt(alpha_bar) 0.068265."""
    last = torch.ones((), dtype=torch.float64)
    assert_close(TABLES["sqrt_linear"].alpha(last).item(), 0.068265, rtol=0, atol=5e-7)
    assert_close(TABLES["sqrt_linear"].log_snr(last).exp().item(), 0.004682, rtol=0, atol=5e-7)


@every_table
@every_dtype
def test_the_discrete_process_is_met_at_every_step(schedule, dtype):
    T = schedule.num_timesteps
    alpha_bar = (1 - schedule.betas()).cumprod(0)  # Ho et al. 2020, eq. 4
    t = (torch.arange(1, T + 1, dtype=torch.float64) / T).to(dtype)
    # The last betas of the cosine fall so fast that the rounding of a float32 t is seen.
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5 + 1e-7 * T * -math.log1p(-schedule.betas().max())
    assert_close(schedule.alpha(t).double() ** 2, alpha_bar, rtol=tolerance, atol=0)


@every_table
def test_alpha_is_geometric_between_the_steps(schedule):
    T = schedule.num_timesteps
    k = torch.arange(T, dtype=torch.float64)
    ends = schedule.alpha(k / T) * schedule.alpha((k + 1) / T)
    assert_close(schedule.alpha((k + 0.5) / T) ** 2, ends, rtol=1e-9, atol=0)


def test_cosine_beta_is_the_continuous_cosine_until_it_clips():
    t = torch.arange(1, 999, dtype=torch.float64) / 1000
    assert_close(CosineBeta().alpha(t), Cosine().alpha(t), rtol=1e-9, atol=0)
    last = torch.ones((), dtype=torch.float64)
    assert 0 < CosineBeta().alpha(last) < CosineBeta().alpha(t[-1]) / 10


def test_betas_alike_in_all_but_their_kind_have_tables_of_their_own():
    half = torch.tensor([0.5])
    alphas = [kind(77, 0.001, 0.3).alpha(half).item() for kind in RAMPS]
    assert len(set(alphas)) == 3
    assert alphas == [kind(77, 0.001, 0.3).alpha(half).item() for kind in RAMPS]


def test_a_table_first_asked_for_under_another_default_device_is_a_table():
    t = torch.tensor([0.3], dtype=torch.float64)
    with torch.device("meta"):
        assert not LinearBeta(79).alpha(t).is_meta
        assert LinearBeta(79).alpha(torch.tensor([0.3])).is_meta
    assert LinearBeta(79).alpha(t) < 1


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("num_timesteps", [1, 0, -5])
def test_a_process_of_less_than_two_steps_is_refused(kind, num_timesteps):
    with pytest.raises(ValueError, match="num_timesteps"):
        kind(num_timesteps=num_timesteps)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        *[(kind, {"beta_first": first}, "beta_first <= beta_last") for kind in RAMPS for first in (0.0, 0.03, -0.1)],
        *[(kind, {"beta_last": 1.0}, "beta_last < 1") for kind in RAMPS],
        *[(ConstantBeta, {"beta": beta}, r"beta must lie in \(0, 1\)") for beta in (0.0, 1.0)],
        *[(CosineBeta, {"beta_max": beta}, "beta_max") for beta in (0.0, 1.0)],
        (CosineBeta, {"offset": 0.0}, "offset"),
    ],
)
def test_betas_that_are_no_process_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
