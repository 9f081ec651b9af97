"""benchmarks/solver_error.py measures what it says, and docs/solver_error.json has every solver."""

import importlib.util
import json
from dataclasses import replace

import pytest
from conftest import ROOT
from options import built
from solving import slope

from diffusion_trainer.sampling.predictor_corrector import PredictorCorrector

SAMPLERS = built("sampler")


@pytest.fixture(scope="module")
def script():
    """benchmarks/solver_error.py, which is no package."""
    spec = importlib.util.spec_from_file_location("solver_error", ROOT / "benchmarks" / "solver_error.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schedule(script):
    return script.from_conf("schedule", "linear")


@pytest.mark.parametrize(("name", "calls_a_step"), [("ddim", 1), ("heun", 2), ("dpmpp_3m", 1)])
def test_the_flow_error_falls_with_the_order_of_the_solver(script, schedule, name, calls_a_step):
    _, sampler = script.samplers()[name]
    exact, steps = script.truth(schedule), (40, 80)
    points = [script.flow_error(replace(sampler, num_steps=n), schedule, exact) for n in steps]
    calls, errors = zip(*points, strict=True)
    assert calls == tuple(calls_a_step * (n - 1) + 1 for n in steps)
    assert slope(steps, errors) == pytest.approx(sampler.solver.order, abs=0.3)


def test_the_law_error_falls_with_the_order_of_the_solver(script, schedule):
    _, sampler = script.samplers()["dpmpp_sde_2m"]
    calls, errors = zip(*[script.law_error(replace(sampler, num_steps=n), schedule) for n in (40, 80)], strict=True)
    assert calls == (40, 80)
    assert slope(calls, errors) == pytest.approx(2, abs=0.3)


def test_the_numbers_in_docs_have_every_sampler_of_conf(script):
    report = json.loads((ROOT / "docs" / "solver_error.json").read_text())
    floor = report.pop("mixture_noise")
    assert set(report) == {*script.SCHEDULES, "stochastic", "mixture"}
    assert min(error for c in report["mixture"].values() for error in c["errors"]) > floor / 3
    deterministic = {name for name, s in SAMPLERS.items() if s.solver.deterministic}
    others = set(SAMPLERS) - deterministic
    correctors = {name for name, s in SAMPLERS.items() if isinstance(s.solver, PredictorCorrector)}
    for panel, curves in report.items():
        random = {"stochastic": others - correctors, "mixture": others | {"edm"}}
        wanted = random.get(panel, deterministic)
        assert {name for c in curves.values() for name in c["samplers"]} == wanted
        for c in curves.values():
            assert all(script.FEWEST <= calls <= script.MOST for calls in c["calls"])
            assert c["calls"] == sorted(set(c["calls"]))
            assert c["errors"][0] > c["errors"][-1] > 0


def test_the_error_of_draws_is_that_of_the_solver(script, schedule, monkeypatch):
    """On the Gaussian, where the exact law is known, but for the noise of the draws."""
    monkeypatch.setattr(script, "MIXTURE", script.GAUSSIAN)
    monkeypatch.setattr(script, "DRAWS", (64, 512))
    sampler = replace(script.samplers()["ancestral"][1], num_steps=10)
    calls, error = script.draws_error(sampler, schedule, script.drawn(1 << 20, schedule, 1))
    assert (calls, error) == (10, pytest.approx(script.law_error(sampler, schedule)[1], rel=0.03))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc"])
def test_the_numbers_in_docs_are_those_of_the_code(script, schedule, name):
    """The last point of a curve, computed again."""
    curve = json.loads((ROOT / "docs" / "solver_error.json").read_text())["linear"][name]
    _, sampler = script.samplers()[name]
    calls, error = script.flow_error(replace(sampler, num_steps=script.MOST), schedule, script.truth(schedule))
    assert calls == curve["calls"][-1]
    assert error == pytest.approx(curve["errors"][-1], rel=1e-3)
