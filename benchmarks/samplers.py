"""Measures what samplers cost outside of the network, against the schedulers of diffusers.

    pip install -e '.[benchmark]'
    python benchmarks/samplers.py [--repetitions 25] [--steps 50] [--device cpu] [--only "DDIM;UniPC"] [--out F.json]

The network gives a tensor that it already has, and noise is drawn once for both sides, so what is measured is all the
rest. Microseconds for each call of the network: of one run over all steps, ours and theirs in turns, in one thread.

ours     the whole of `Sampler.__call__`, NetworkDenoiser and the look for NaN included, less its plan
theirs   the loop over scheduler.timesteps with scale_model_input and step, without set_timesteps
ratio    median of ours / theirs of neighbouring runs; "of runs": with plan in ours and set_timesteps in theirs
plan     microseconds once for a run: Sampler.plan; set_timesteps; and what the first run of a NetworkDenoiser costs
         beyond later ones, as it computes the coefficients of its prediction

Then it runs both on a network that is a function of x, in float64, and reports how far their results are apart.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor

from diffusion_trainer.process.beta_tables import BetaTable, LinearBeta
from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.predictions import Epsilon, Flow, Prediction
from diffusion_trainer.process.schedules import RectifiedFlow, Schedule
from diffusion_trainer.process.variances import FixedSmall
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.dpm_solver import DPMSolverPP2M, DPMSolverPP2S, DPMSolverPP3M, DPMSolverPPSDE2M
from diffusion_trainer.sampling.edm import EDMHeun
from diffusion_trainer.sampling.grids import Grid, Trailing, UniformLogSNR
from diffusion_trainer.sampling.pndm import IPNDM, PNDM
from diffusion_trainer.sampling.runge_kutta import Midpoint
from diffusion_trainer.sampling.sampler import Sampler
from diffusion_trainer.sampling.solvers import Solver
from diffusion_trainer.sampling.unipc import UniPC

SHAPES = ((4, 3, 32, 32), (16, 4, 32, 32))
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
TRAILING = LINEAR | {"timestep_spacing": "trailing"}
DPM = LINEAR | {"use_lu_lambdas": True, "final_sigmas_type": "zero"}  # uniform in log-SNR
SINGLESTEP = LINEAR | {"final_sigmas_type": "zero", "lower_order_final": True}
MULTISTEP, LOG_SNR = "DPMSolverMultistepScheduler", UniformLogSNR()


@dataclass(frozen=True)
class Pair:
    """A solver of ours and the scheduler that does the same or comes nearest."""

    solver: Solver
    scheduler: str  # a class of diffusers
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)  # of its step()
    grid: Grid = field(default_factory=Trailing)
    prediction: Prediction = field(default_factory=Epsilon)
    schedule: Schedule = field(default_factory=LinearBeta)
    scales: bool = True  # its x by init_noise_sigma and scale_model_input
    x_0_bound: float | None = None

    def ours(self, num_steps: int) -> Sampler:
        return Sampler(self.solver, self.grid, num_steps, x_0_bound=self.x_0_bound)

    def theirs(self) -> Any:
        return getattr(diffusers, self.scheduler)(**self.config)


FLOW = {"prediction": Flow(), "schedule": RectifiedFlow(t_max=1.0), "scales": False}

PAIRS = {
    "DDIM": Pair(DDIM(), "DDIMScheduler", TRAILING | {"clip_sample": False}),
    "DDIM, clipped": Pair(DDIM(), "DDIMScheduler", TRAILING, x_0_bound=1.0),
    "DDIM, eta 1": Pair(DDIM(eta=1.0), "DDIMScheduler", TRAILING | {"clip_sample": False}, {"eta": 1.0}),
    "DDPM": Pair(DDIM(eta=1.0), "DDPMScheduler", TRAILING | {"clip_sample": False}),
    "DDPM, clipped": Pair(DDIM(eta=1.0), "DDPMScheduler", TRAILING, x_0_bound=1.0),
    "Euler": Pair(DDIM(), "EulerDiscreteScheduler", TRAILING),
    "Euler ancestral": Pair(DDIM(eta=1.0), "EulerAncestralDiscreteScheduler", TRAILING),
    "Euler, rectified flow": Pair(DDIM(), "FlowMatchEulerDiscreteScheduler", **FLOW),
    "Heun": Pair(EDMHeun(), "HeunDiscreteScheduler", TRAILING),
    "Heun, rectified flow": Pair(EDMHeun(), "FlowMatchHeunDiscreteScheduler", **FLOW),
    "Midpoint": Pair(Midpoint(), "KDPM2DiscreteScheduler", TRAILING),
    "DPM-Solver++(2M)": Pair(DPMSolverPP2M(), MULTISTEP, DPM, grid=LOG_SNR),
    "DPM-Solver++(3M)": Pair(DPMSolverPP3M(), MULTISTEP, DPM | {"solver_order": 3}, grid=LOG_SNR),
    "DPM-Solver++(2S)": Pair(DPMSolverPP2S(), "DPMSolverSinglestepScheduler", SINGLESTEP),
    "SDE-DPM-Solver++(2M)": Pair(
        DPMSolverPPSDE2M(), MULTISTEP, DPM | {"algorithm_type": "sde-dpmsolver++"}, grid=LOG_SNR
    ),
    "UniPC": Pair(UniPC(), "UniPCMultistepScheduler", TRAILING | {"final_sigmas_type": "zero"}),
    "PNDM": Pair(PNDM(), "PNDMScheduler", TRAILING | {"skip_prk_steps": False}),
    "IPNDM (theirs: PLMS)": Pair(IPNDM(), "PNDMScheduler", TRAILING | {"skip_prk_steps": True}),
    "IPNDM": Pair(IPNDM(), "IPNDMScheduler"),
}


class Run:
    """One pair on tensors of one shape; `calls` counts those of the network."""

    def __init__(self, pair: Pair, shape: Sequence[int], num_steps: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.x, self.eps, self.z = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
        self.pair, self.num_steps, self.calls = pair, num_steps, 0
        self.sampler, self.scheduler = pair.ours(num_steps), pair.theirs()
        self.denoiser = self.new_denoiser()

    def new_denoiser(self) -> NetworkDenoiser:
        return NetworkDenoiser(self.network, lambda condition: condition, self.pair.schedule, self.pair.prediction)

    def network(self, x: Tensor, c_noise: Tensor, condition: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.eps

    def ours(self) -> Tensor:
        return self.sampler(self.denoiser, self.pair.schedule, FixedSmall(), self.x, None, lambda: self.z)

    def plan(self) -> None:
        self.sampler.plan(self.pair.schedule, FixedSmall())

    def set_timesteps(self) -> None:
        self.scheduler.set_timesteps(self.num_steps, device=self.x.device)

    @torch.no_grad()
    def theirs(self) -> Tensor:
        scheduler, scales = self.scheduler, self.pair.scales
        x = self.x * scheduler.init_noise_sigma if scales else self.x
        for t in scheduler.timesteps:
            eps = self.network(scheduler.scale_model_input(x, t) if scales else x, t)
            x = scheduler.step(eps, t, x, **self.pair.arguments).prev_sample
        return x

    def count(self, run: Callable[[], Any]) -> int:
        self.calls = 0
        run()
        return self.calls


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start


def fixed_noise(z: Tensor) -> ExitStack:
    """Every scheduler of diffusers gets z for the noise that it draws."""
    stack = ExitStack()
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.schedulers.scheduling_") and "randn_tensor" in vars(module):
            stack.enter_context(mock.patch.object(module, "randn_tensor", return_value=z))
    return stack


def measure(pair: Pair, shape: Sequence[int], num_steps: int, device: torch.device, repetitions: int) -> dict[str, Any]:
    """In microseconds: for each call of the network, and once for a run."""
    run = Run(pair, shape, num_steps, device)
    with fixed_noise(run.z):
        run.set_timesteps()
        calls = run.count(run.ours), run.count(run.theirs)
        samples = defaultdict(list)
        for _ in range(repetitions):
            set_timesteps, plan = (1e6 * seconds(once, device) for once in (run.set_timesteps, run.plan))
            whole, theirs = (1e6 * seconds(loop, device) for loop in (run.ours, run.theirs))
            samples["ours"].append((whole - plan) / calls[0])
            samples["theirs"].append(theirs / calls[1])
            samples["ratio"].append(samples["ours"][-1] / samples["theirs"][-1])
            samples["ratio_of_runs"].append(whole / calls[0] / ((theirs + set_timesteps) / calls[1]))
            samples["plan"].append(plan)
            samples["set_timesteps"].append(set_timesteps)
            run.denoiser = run.new_denoiser()
            samples["first"].append(1e6 * seconds(run.ours, device) - whole)
    return {"calls": calls, **{name: spread(values) for name, values in samples.items()}}


def spread(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("lower_quartile", "median", "upper_quartile"), quantiles(values, n=4), strict=True))


HEADER = ("", "ours", "quartiles", "theirs", "quartiles", "ratio", "of runs", "plan", "set_timesteps", "first run")


def row(name: str, r: dict[str, Any]) -> str:
    cells = [name]
    for side in ("ours", "theirs"):
        cells.append(f"{r[side]['median']:.1f}")
        cells.append(f"{r[side]['lower_quartile']:.1f} to {r[side]['upper_quartile']:.1f}")
    cells += [f"{r[ratio]['median']:.2f}" for ratio in ("ratio", "ratio_of_runs")]
    cells += [f"{r[part]['median']:,.0f}" for part in ("plan", "set_timesteps", "first")]
    return "| " + " | ".join(cells) + " |"


@dataclass(frozen=True)
class TheirBetas(BetaTable):
    """The very alphas of diffusers, which it has in float32."""

    def betas(self) -> Tensor:
        products = PAIRS["DDIM"].theirs().alphas_cumprod.double()
        return 1 - products / torch.cat([products.new_ones(1), products[:-1]])


def difference(pair: Pair, num_steps: int) -> float:
    """Largest difference of the two results over the largest of ours, in float64, on a network that depends on x."""
    run = Run(replace(pair, schedule=TheirBetas()), (2, 3, 4, 4), num_steps, torch.device("cpu"))
    run.x = run.x.double()
    run.network = lambda x, c_noise, condition=None: x.tanh()
    run.denoiser = run.new_denoiser()
    run.scheduler.alphas_cumprod = run.scheduler.alphas_cumprod.double()  # their numbers, not their rounding
    run.set_timesteps()
    if "sigmas" in vars(run.scheduler):
        run.scheduler.sigmas = run.scheduler.sigmas.double()
    ours = run.ours()
    run.x = run.pair.schedule.at_noisy_end.sigma * run.x  # where ours starts; theirs takes sigma for 1
    theirs = run.theirs()
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


# Both are the same method on the same levels; the most that they may differ by. 3M is not: see DPMSolverPP3M.
SAME = {"DDIM": 1e-5, "DPM-Solver++(2M)": 1e-5, "DPM-Solver++(3M)": None}


def main(arguments: Sequence[str]) -> int:
    options = read(arguments)
    torch.set_num_threads(1)
    device, report = torch.device(options.device), {"steps": options.steps, "repetitions": options.repetitions}
    report |= {"torch": torch.__version__, "diffusers": diffusers.__version__, "device": options.device}
    for shape in SHAPES:
        print(f"\n{shape} on {options.device}, microseconds, load average {os.getloadavg()[0]:.1f}\n")
        print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
        for name in options.only or PAIRS:
            result = measure(PAIRS[name], shape, options.steps, device, options.repetitions)
            report.setdefault(str(shape), {})[name] = result
            print(row(name, result), flush=True)
    report["difference"] = {name: difference(PAIRS[name], options.steps) for name in SAME}
    print("\nlargest relative difference of the results, float64:", report["difference"])
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return int(any(bound and report["difference"][name] > bound for name, bound in SAME.items()))


def read(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", type=lambda text: text.split(";"), help=f"some of: {'; '.join(PAIRS)}")
    parser.add_argument("--out", type=Path, help="file for all numbers, as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
