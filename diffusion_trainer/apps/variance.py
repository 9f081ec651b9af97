"""diffusion-trainer variance: measures a checkpoint's posterior variance, for analytic variances and trajectories.

Under torchrun or srun the ranks share the work.
"""

from collections.abc import Sequence
from pathlib import Path

from diffusion_trainer.apps import statistics
from diffusion_trainer.apps.config import dump
from diffusion_trainer.apps.finished import FROM_THE_RUN, Finished, FinishedConfig, load
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.processes import agreeing
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.posterior_variance import PosteriorVarianceMeasurement


class VarianceConfig(FinishedConfig):
    num_samples: int
    num_levels: int
    batch_size: int
    seed: int


def _load(overrides: Sequence[str]) -> dict:
    return load("variance", overrides, VarianceConfig, FROM_THE_RUN)


def show(overrides: Sequence[str]) -> str:
    return dump(_load(overrides))


def main(overrides: Sequence[str]) -> int:
    config = _load(overrides)
    try:
        measure = PosteriorVarianceMeasurement(
            config["num_samples"], config["num_levels"], config["batch_size"], config["seed"]
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    with agreeing() as agreement:
        finished = Finished.of(config, config["seed"])
        data = build(config["data"], "data", config["allowed_targets"])
        folder, weights = finished.checkpoint.folder, config["weights"]
        about = statistics.about(folder, weights) | {"num_samples": config["num_samples"], "seed": config["seed"]}
        result = measure(
            finished.generator.denoiser, finished.generator.schedule, data, finished.parts.conditioning,
            finished.generator.sampler.x_0_bound, finished.device, agreement, about,
        )  # fmt: skip
        out = config["out"] or str(statistics.path_of(folder, weights))
        if agreement.rank == 0:
            try:
                statistics.write(Path(out), result)
            except OSError as error:
                raise UserError(f"out={out} cannot be written ({error}); choose another out=...") from error
            print(
                f"variance of x_0 given x_t at {config['num_levels']} noise levels from "
                f"{config['num_samples']:,} samples: {out}\n"
                "use it with variance=analytic, variance=analytic_diagonal or sampler=optimal_trajectory"
            )
    return 0
