"""diffusion-trainer variance: measures a checkpoint's posterior variance, for analytic variances and trajectories.

Under torchrun or srun the ranks share the work.
"""

from collections.abc import Sequence
from pathlib import Path

from diffusion_trainer.apps import finished, statistics
from diffusion_trainer.apps.config import dump
from diffusion_trainer.apps.finished import MODEL, ModelConfig, written
from diffusion_trainer.apps.measuring import measuring
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.posterior_variance import PosteriorVarianceMeasurement


class VarianceConfig(ModelConfig):
    sampler: dict  # for its x_0_bound
    num_samples: int
    num_levels: int
    batch_size: int
    seed: int


def _load(overrides: Sequence[str]) -> dict:
    # Statistics are what this makes: those that the run's sampler may name are not asked for.
    return finished.compose("variance", overrides, VarianceConfig, (*MODEL, "sampler"))


def show(overrides: Sequence[str]) -> str:
    return dump(_load(overrides))


def check(overrides: Sequence[str]) -> dict:
    """The configuration; UserError for what can be known to fail before weights are read."""
    config = _load(overrides)
    _measurement(config)
    finished.check(config)
    return config


def _measurement(config: dict) -> PosteriorVarianceMeasurement:
    try:
        return PosteriorVarianceMeasurement(
            config["num_samples"], config["num_levels"], config["batch_size"], config["seed"]
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def main(overrides: Sequence[str]) -> int:
    config = check(overrides)
    bound, weights = build(config["sampler"], "sampler", config["allowed_targets"]).x_0_bound, config["weights"]
    with measuring(config) as m:
        how = {name: config[name] for name in ("num_samples", "num_levels", "seed")}
        about = statistics.about(m.checkpoint.folder, weights) | how | {statistics.BOUND: bound}
        result = _measurement(config)(
            m.denoiser, m.schedule, m.data, m.conditioning, bound, m.device, m.agreement, about
        )
        out = Path(config["out"] or statistics.path_of(m.checkpoint.folder, weights))
        if m.agreement.rank == 0:
            with written(out):
                statistics.write(out, result)
            print(
                f"variance of x_0 given x_t at {config['num_levels']} noise levels from "
                f"{config['num_samples']:,} samples: {out}\n"
                "use it with variance=analytic, variance=analytic_diagonal or sampler=optimal_trajectory"
            )
    return 0
