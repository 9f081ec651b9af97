"""variance, likelihood and the modes of sample, through the console command."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from diffusion_trainer.apps import cli as console
from diffusion_trainer.conventions import UserError

pytestmark = pytest.mark.slow
VARIANCE = ["variance", "checkpoint=runs/digits", "num_samples=60", "num_levels=20"]


@pytest.fixture(autouse=True)
def in_the_folder(trained, monkeypatch):
    monkeypatch.chdir(trained)


@pytest.fixture(scope="module")
def measured(trained):
    """The variance statistics beside the checkpoint of the run, as the verb writes them."""
    here = os.getcwd()
    os.chdir(trained)
    try:
        assert console.run(VARIANCE) == 0
    finally:
        os.chdir(here)
    return trained / "runs" / "digits" / "variances" / "images-000000000032-ema.safetensors"


def test_variance_is_measured_alike_on_two_processes(measured, tmp_path):
    out = tmp_path / "two.safetensors"
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "diffusion_trainer",
         *VARIANCE, f"out='{out}'", "batch_size=7"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    one, two = load_file(measured), load_file(out)
    assert torch.equal(one["log_snr"], two["log_snr"])
    torch.testing.assert_close(two["error"], one["error"], rtol=1e-5, atol=0)
    assert one["error"].shape == (20, 1, 8, 8)
    assert (one["error"] > 0).all()


@pytest.mark.parametrize("choice", ["sampler=ancestral", "sampler=ddim", "sampler=optimal_trajectory"])
@pytest.mark.parametrize("variance", ["analytic", "analytic_diagonal"])
def test_statistics_are_found_and_change_the_samples(measured, tmp_path, choice, variance):
    out = {v: tmp_path / v for v in (variance, "beta_tilde")}
    for v, path in out.items():
        arguments = ["checkpoint=runs/digits", "n=4", choice, "sampler.num_steps=4", f"variance={v}", f"out='{path}'"]
        assert console.run(["sample", *arguments]) == 0
    a, b = (np.load(f"{path}.npz") for path in out.values())
    assert a["images"].shape == (4, 1, 8, 8)
    assert (a["images"] != b["images"]).any()
    assert json.loads(str(a["provenance"]))["variance"]["statistics"].endswith("-ema.safetensors")


def test_statistics_of_other_weights_are_refused_by_name(measured):
    with pytest.raises(UserError, match=r"images-000000000032 \(ema weights\), not on .*raw weights"):
        console.run(
            ["sample", "checkpoint=runs/digits", "sampler=ancestral", "variance=analytic", "weights=raw",
             f"variance.statistics='{measured}'"]
        )  # fmt: skip
    with pytest.raises(UserError, match="diffusion-trainer variance"):
        console.run(["sample", "checkpoint=runs/digits", "sampler=ancestral", "variance=analytic", "weights=raw"])


FITTED = ["likelihood=flow_variational", "likelihood.dequantization.num_steps=20"]


@pytest.mark.parametrize("options", [["likelihood=bound", "likelihood.num_steps=5"], ["likelihood=flow"], FITTED])
def test_likelihood_is_the_sum_of_its_terms_and_does_not_depend_on_batches(trained, tmp_path, options):
    if "flow" in options[0]:
        options = [*options, "likelihood.rtol=1e-3", "likelihood.atol=1e-3"]
    reports = []
    for size in (4, 3):
        out = tmp_path / f"{size}.json"
        assert (
            console.run(["likelihood", "checkpoint=runs/digits", "n=4", *options, f"batch_size={size}", f"out='{out}'"])
            == 0
        )
        reports.append(json.loads(out.read_text()))
    first, second = (report["metrics"] for report in reports)
    assert first["bits_per_dim"] == pytest.approx(sum(v for k, v in first.items() if k != "bits_per_dim"))
    assert first == pytest.approx(second, rel=1e-4 if "bound" in options[0] else 1e-2)
    assert reports[0]["provenance"]["num_images"] == 4
    assert reports[0]["terms"]["bits_per_dim"]["standard_error"] > 0
    fits = [report["provenance"].get("fitted") for report in reports]
    assert fits[0] == fits[1]
    assert (fits[0] is not None) == (options[0] == FITTED[0])


def test_a_likelihood_is_fitted_and_measured_alike_on_two_processes(trained, tmp_path):
    arguments = ["likelihood", "checkpoint=runs/digits", "n=4", *FITTED, "likelihood.rtol=1e-3", "likelihood.atol=1e-3"]
    assert console.run([*arguments, f"out='{tmp_path}/one.json'"]) == 0
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "diffusion_trainer",
         *arguments, f"out='{tmp_path}/two.json'"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-2)
    for name in ("offset", "gain", "scale"):
        for ours, theirs in zip(*(report["provenance"]["fitted"][name] for report in (one, two)), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    assert one["provenance"]["fitted"]["num_images"] == two["provenance"]["fitted"]["num_images"] == 4


def test_modes_write_pictures_and_say_what_they_found(trained, tmp_path, capsys):
    size = lambda columns, rows: (columns * 33 - 1, rows * 33 - 1)  # noqa: E731
    expected = {
        "draw": size(2, 2), "interpolate mode.points=5": size(5, 4), "reconstruct mode.steps=[5,40]": size(4, 3),
        "invert": size(4, 3),
    }  # fmt: skip
    for choice, shape in expected.items():
        mode, *more = choice.split()
        out = tmp_path / mode
        assert (
            console.run(
                [
                    "sample",
                    "checkpoint=runs/digits",
                    "n=4",
                    "sampler.num_steps=20",
                    f"mode={mode}",
                    *more,
                    f"out='{out}'",
                ]
            )
            == 0
        )
        assert Image.open(f"{out}.png").size == shape
    found = np.load(tmp_path / "reconstruct.npz")
    assert found["mean_squared_error"][1] < found["mean_squared_error"][0]
    assert np.load(tmp_path / "invert.npz")["x_T"].shape == (4, 1, 8, 8)
    assert "mean squared error by steps: 5: " in capsys.readouterr().out


def test_modes_that_need_a_deterministic_sampler_say_so():
    for mode in ("interpolate", "reconstruct", "invert"):
        with pytest.raises(UserError, match=f"mode={mode} needs a deterministic sampler"):
            console.run(
                ["sample", "checkpoint=runs/digits", f"mode={mode}", "sampler=ancestral", "sampler.num_steps=4"]
            )


def test_a_pair_that_cannot_be_is_refused_before_the_weights_are_read():
    with pytest.raises(UserError, match="EDMHeun has no use for the reverse variance FixedLarge"):
        console.run(["sample", "checkpoint=runs/digits", "sampler=edm", "variance=beta"])
    with pytest.raises(UserError, match="num_steps=2 is too few for DPMSolverPP3M"):
        console.run(["sample", "checkpoint=runs/digits", "sampler=dpmpp_3m", "sampler.num_steps=2"])


def test_a_likelihood_does_not_ask_what_the_sampler_would_do_with_its_variance(measured, trained, tmp_path):
    """The run's sampler may have no use for a reverse variance; the bound has."""
    config = (trained / "runs" / "digits" / "config.yaml").read_text()
    other = tmp_path / "run"
    shutil.copytree(trained / "runs" / "digits", other)
    heun = "solver: {_target_: diffusion_trainer.sampling.runge_kutta.Heun}"
    text, count = re.subn(r"solver: \{_target_: \S+DDIM, eta: 0.0\}", heun, config)
    assert count == 1
    (other / "config.yaml").write_text(text)
    arguments = [f"checkpoint='{other}'", "variance=beta", "n=2"]
    assert console.run(["likelihood", *arguments, "likelihood.num_steps=3"]) == 0
    with pytest.raises(UserError, match="Heun has no use for the reverse variance FixedLarge"):
        console.run(["sample", *arguments])
