"""Draws how far each solver of conf/sampler is from the truth after so many calls of the network.

    pip install -e '.[benchmark]'
    python benchmarks/solver_error.py [--out docs/solver_error]

Writes <out>.json and <out>.png. The data are the mixture of two Gaussians in tests/exact.py, whose denoiser is known:
all error is the solver's. All solvers take steps that are equal in log-SNR, whatever the grid in their yaml, from the
noisy end of the schedule to its clean one; a run's last call, the jump from there to 0, is counted, and its error, the
same for all, is not.

deterministic   root mean square over samples and dimensions of x / alpha less that of the probability flow, which is
                Dormand and Prince's method at a tolerance of 1e-11; sampler=dopri5 is drawn over its tolerance
stochastic      the covariance of what is drawn less the true one, over the true one (Frobenius norms): on the mixture
                of 131,072 draws, whose own noise is drawn as a line, and on one Gaussian exactly, where a solver's law
                has a closed form (the predictor-corrector's has none, it is not affine)
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the closed-form truth lives there

from exact import GAUSSIAN, MIXTURE, ExactDenoiser, Pixels  # noqa: E402
from solving import law  # noqa: E402

from diffusion_trainer.apps.nodes import build  # noqa: E402
from diffusion_trainer.process.denoiser import Denoiser  # noqa: E402
from diffusion_trainer.process.levels import levels  # noqa: E402
from diffusion_trainer.process.schedules import Schedule  # noqa: E402
from diffusion_trainer.process.variances import FixedSmall  # noqa: E402
from diffusion_trainer.sampling.adaptive import DormandPrince  # noqa: E402
from diffusion_trainer.sampling.edm import EDMHeun  # noqa: E402
from diffusion_trainer.sampling.grids import UniformLogSNR  # noqa: E402
from diffusion_trainer.sampling.predictor_corrector import PredictorCorrector  # noqa: E402
from diffusion_trainer.sampling.sampler import Sampler  # noqa: E402

FEWEST, MOST = 5, 100  # calls of the network
STEPS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 40, 50, 64, 80, 100)
TOLERANCES = tuple(10 ** (-i / 2) for i in range(1, 15))
SCHEDULES = ("linear", "rectified_flow")
SAMPLES = 256
DRAWS = (256, 512)  # images and pixels; the corrector's step size is an image's
EXACT_DRAWS = 1 << 22


@dataclass(frozen=True)
class Counting(Denoiser):
    """Counts the calls of another one."""

    inner: Denoiser
    calls: list[None] = field(default_factory=list)

    def __call__(self, x_t, level, condition):
        self.calls.append(None)
        return self.inner(x_t, level, condition)

    def null(self, condition):
        return self.inner.null(condition)


def from_conf(group: str, name: str) -> Any:
    return build(yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text()), group)


def samplers() -> dict[str, tuple[list[str], Sampler]]:
    """One sampler for each solver of conf/sampler, and all its names there: on one grid they are the same."""
    out: dict[Any, tuple[list[str], Sampler]] = {}
    for path in sorted((ROOT / "conf" / "sampler").glob("*.yaml")):
        sampler = replace(from_conf("sampler", path.stem), grid=UniformLogSNR(), x_0_bound=None)
        out.setdefault(sampler.solver, ([], sampler))[0].append(path.stem)
    return {names[0]: (names, sampler) for names, sampler in out.values()}


def versions(sampler: Sampler) -> list[Sampler]:
    """From the least to the most accurate: over the number of steps or, if it chooses its own steps, its tolerance."""
    if isinstance(sampler.solver, DormandPrince):
        return [replace(sampler, solver=DormandPrince(rtol=tol, atol=tol), num_steps=2) for tol in TOLERANCES]
    return [replace(sampler, num_steps=n) for n in STEPS if n > sampler.solver.history]


def start() -> Tensor:
    return torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def truth(schedule: Schedule) -> Tensor:
    """x / alpha at the clean end of the probability flow from `start`."""
    reference = Sampler(DormandPrince(rtol=1e-11, atol=1e-11), UniformLogSNR(), 2, x_0_bound=None)
    return reference.decode(ExactDenoiser(MIXTURE), schedule, start(), None)


def flow_error(sampler: Sampler, schedule: Schedule, exact: Tensor) -> tuple[int, float]:
    """Calls of the network in a whole run, and the error of a deterministic sampler before its jump to 0."""
    denoiser = Counting(ExactDenoiser(MIXTURE))
    x = sampler.decode(denoiser, schedule, start(), None)
    return len(denoiser.calls) + 1, (x - exact).square().mean().sqrt().item()


def law_error(sampler: Sampler, schedule: Schedule) -> tuple[int, float]:
    """As `flow_error`, of the covariance of a stochastic sampler of one call a step.

    It ends on x_0_hat, which lacks Var[x_0 | x_t] at the clean end whatever the solver: so does the truth here.
    """
    _, alpha, sigma = levels(schedule, schedule.t_range[:1])[0]
    exact = GAUSSIAN.covariance() - GAUSSIAN.posterior_covariance(GAUSSIAN.means, alpha, sigma)[0]
    return sampler.num_steps, ((law(sampler, schedule)[1] - exact).norm() / exact.norm()).item()


def drawn(count: int, schedule: Schedule, seed: int) -> Tensor:
    """The covariance of so many x_0_hat of exact x_t at the clean end: where every sampler makes its last jump."""
    _, alpha, sigma = levels(schedule, schedule.t_range[:1])[0]
    generator = torch.Generator().manual_seed(seed)
    x_0, _ = MIXTURE.sample(count, generator)
    x_t = alpha * x_0 + sigma * torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    return MIXTURE.denoise(x_t, torch.tensor(alpha), torch.tensor(sigma)).T.cov()


def draws_error(sampler: Sampler, schedule: Schedule, exact: Tensor) -> tuple[int, float]:
    """As `law_error`, on the mixture, of any stochastic sampler: images whose pixels are independent draws."""
    denoiser, generator = Counting(Pixels(MIXTURE)), torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(*DRAWS, 2, generator=generator, dtype=torch.float64)  # noqa: E731
    x_0 = sampler(denoiser, schedule, FixedSmall(), noise(), None, noise)
    covariance = x_0.reshape(-1, 2).T.cov()
    return len(denoiser.calls), ((covariance - exact).norm() / exact.norm()).item()


def curve(names: Sequence[str], sampler: Sampler, error: Callable[[Sampler], tuple[int, float]]) -> dict[str, Any]:
    points = dict(error(version) for version in versions(sampler))
    points = {calls: points[calls] for calls in sorted(points) if FEWEST <= calls <= MOST}
    names, order = list(names), sampler.solver.order
    return {"samplers": names, "order": order, "calls": list(points), "errors": list(points.values())}


def measure() -> dict[str, Any]:
    """Panel -> name -> curve; mixture_noise: the error of as many exact draws."""
    report, known = {}, samplers()
    for name in SCHEDULES:
        schedule = from_conf("schedule", name)
        exact = truth(schedule)
        report[name] = {
            first: curve(names, sampler, lambda s, at=schedule, x=exact: flow_error(s, at, x))
            for first, (names, sampler) in known.items()
            if sampler.solver.deterministic
        }
    schedule = from_conf("schedule", SCHEDULES[0])
    random = {first: entry for first, entry in known.items() if not entry[1].solver.deterministic}
    report["stochastic"] = {
        first: curve(names, sampler, lambda s: law_error(s, schedule))
        for first, (names, sampler) in random.items()
        if not isinstance(sampler.solver, PredictorCorrector)
    }
    random["edm, churn 10"] = (["edm"], replace(known["edm"][1], solver=EDMHeun(churn=10.0)))
    exact = drawn(EXACT_DRAWS, schedule, 1)
    report["mixture"] = {
        first: curve(names, sampler, lambda s: draws_error(s, schedule, exact))
        for first, (names, sampler) in random.items()
    }
    sets = [drawn(DRAWS[0] * DRAWS[1], schedule, seed) for seed in range(2, 18)]
    report["mixture_noise"] = sum(((c - exact).norm() / exact.norm()).item() for c in sets) / len(sets)
    return report


TITLES = {
    "linear": "deterministic, schedule=linear",
    "rectified_flow": "deterministic, schedule=rectified_flow",
    "mixture": "stochastic, schedule=linear",
    "stochastic": "stochastic, one Gaussian",
}
COLOURS = {
    "ddim": "black", "ancestral": "black", "dpmpp_2m": "tab:blue", "dpmpp_3m": "navy", "dpmpp_2s": "deepskyblue",
    "dpmpp_sde_2m": "tab:blue", "unipc": "tab:purple", "heun": "tab:green", "midpoint": "olive", "edm": "tab:orange",
    "ipndm": "tab:red", "pndm": "tab:pink", "dopri5": "tab:brown", "euler_maruyama": "tab:red",
    "edm, churn 10": "tab:orange", "predictor_corrector_ve": "tab:green",
}  # fmt: skip
LABELS = {
    "ddim": "ddim, euler",
    "predictor_corrector_ve": "predictor-corrector",
}  # the first of a solver's names, unless these
LOWEST, HIGHEST = 1e-5, 1.0


def draw(report: dict[str, dict[str, Any]], file: Path) -> None:
    import matplotlib  # not needed to measure

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(1, len(TITLES), figsize=(16, 6), sharey=True, layout="constrained")
    for ax, panel in zip(axes, TITLES, strict=True):
        curves = report[panel]
        ax.set(xscale="log", yscale="log", title=TITLES[panel], xlabel="calls of the network")
        ax.set(xlim=(FEWEST, MOST), ylim=(LOWEST, HIGHEST))
        ax.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        ax.minorticks_off()
        guides(ax)
        for name, c in curves.items():
            ax.plot(
                c["calls"], c["errors"], color=COLOURS.get(name, "dimgray"), marker="o", markersize=2.5, linewidth=1.5
            )
        label(ax, curves)
        if panel == "mixture":
            ax.axhline(report["mixture_noise"], color="darkgray", linestyle=":", linewidth=1)
            ax.annotate(
                "of exact draws", (FEWEST * 1.05, report["mixture_noise"] * 0.8), color="gray", fontsize=9, va="top"
            )
    axes[0].set_ylabel("RMS error of x; two on the right: relative error of the covariance")
    figure.savefig(file, dpi=128, pil_kwargs={"optimize": True})


def guides(ax: Any) -> None:
    """Slopes 1, 2 and 3, where there are no curves."""
    start, stop, height = 5.6, 10.0, 2e-4
    for order in (1, 2, 3):
        end = height * (stop / start) ** -order
        ax.plot((start, stop), (height, end), color="darkgray", linewidth=1)
        ax.annotate(f"slope {order}", (stop * 1.05, end), color="gray", fontsize=9, va="center")


def label(ax: Any, curves: dict[str, dict[str, Any]]) -> None:
    """Names at the right of the curves' ends, pushed apart where they would overlap."""
    last, gap = float("inf"), 1.45
    for name, c in sorted(curves.items(), key=lambda item: -item[1]["errors"][-1]):
        end = (c["calls"][-1], max(c["errors"][-1], LOWEST))
        last, tint = min(end[1], last / gap), COLOURS.get(name, "dimgray")
        line = {"arrowstyle": "-", "color": tint, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
        place = {"va": "center", "annotation_clip": False, "arrowprops": line}
        ax.annotate(LABELS.get(name, name), end, (MOST * 1.15, last), color=tint, **place)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "solver_error", help="without its ending")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report = measure()
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
