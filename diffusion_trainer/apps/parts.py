"""The objects that a checked configuration describes, and the checks that need more than one of them."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from diffusion_trainer.apps.nodes import Schema, build
from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.objectives.base import Objective
from diffusion_trainer.sampling.likelihood import Likelihood
from diffusion_trainer.sampling.solvers import Solver
from diffusion_trainer.training.model import Model, missing_for_compile

MOST_SIGNAL = -4.0  # log-SNR of a noisy end that passes for noise: alpha is 0.13; Stable Diffusion's is -5.4


class ResumeConfig(Schema):
    allow_config_change: bool


class TrainConfig(Schema):
    """The top level of conf/train.yaml."""

    name: str
    folder: str
    init_from: str | None
    second_head: bool
    seed: int
    num_images: int
    batch_size: int
    lanes: int
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    compile: bool
    channels_last: bool
    condition_dropout: float
    allowed_targets: list[str]
    resume: ResumeConfig
    schedule: dict
    prediction: dict
    timesteps: dict
    weighting: dict
    objective: dict
    network: dict
    conditioning: dict
    data: dict
    optimizer: dict
    ema: dict
    sampler: dict
    variance: dict
    guidance: dict
    evaluation: dict | None
    callbacks: dict
    logger: dict
    strategy: dict
    trainer: dict


def dtype_of(precision: str, device: str) -> torch.dtype:
    """auto is bf16 on GPUs that compute in it, fp32 elsewhere. fp32 means it: cuDNN's TF32 is switched off."""
    torch.backends.cudnn.allow_tf32 = False
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    auto = torch.bfloat16 if bf16 else torch.float32
    return {"auto": auto, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


@dataclass(frozen=True)
class Parts:
    """What training, sampling and evaluation have in common."""

    network: nn.Module
    conditioning: Conditioning
    objective: Objective
    channels_last: bool = False
    compiled: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], seed: int = 0, device: str = "cpu") -> "Parts":
        """Builds network, conditioning and objective with weights that depend on the seed alone.

        device meta gives network and conditioning without memory for their weights.
        """
        allowed = config.get("allowed_targets", ())
        torch.manual_seed(seed)
        with torch.device(device):
            network, conditioning = (build(config[name], name, allowed) for name in ("network", "conditioning"))
        objective = build(config["objective"], "objective", allowed)
        compiled = config.get("compile", False) and device != "meta"
        return cls(network, conditioning, objective, config.get("channels_last", False), compiled)

    def model(self, dtype: torch.dtype) -> Model:
        """With just the parameters that the objective trains requiring gradients."""
        model = Model(self.network, self.conditioning, dtype, self.objective.learned, self.channels_last, self.compiled)
        for name, p in model.named_parameters():
            p.requires_grad_(self.objective.trains(name))
        return model


def generator_of(
    config: Mapping[str, Any], model: Model, objective: Objective, device: torch.device, seed: int
) -> Generator:
    """Draws from a model as it is now: a learned schedule is the one of this moment."""
    allowed = config["allowed_targets"]
    schedule = objective.schedule.frozen()
    sampler, variance, guidance, data = (
        build(config[g], g, allowed) for g in ("sampler", "variance", "guidance", "data")
    )
    denoiser = model.denoiser(schedule, objective.prediction)
    return Generator(denoiser, schedule, sampler, variance, guidance, data.image_shape, device, seed)


def check_sampling(config: Mapping[str, Any], accelerator: str = "cpu") -> None:
    """UserError if sampler, schedule, prediction, variance and precision do not go together."""
    allowed = config["allowed_targets"]
    objective, sampler, variance = (build(config[g], g, allowed) for g in ("objective", "sampler", "variance"))
    try:
        sampler.plan(objective.schedule.frozen(), variance)
    except ValueError as error:
        raise UserError(f"sampler: {error}") from error
    check_precision(config, accelerator, "sampler.solver", sampler.solver)
    check_variance(config)


def warn_of_signal(config: Mapping[str, Any]) -> None:
    """Of a schedule and grid that go together: a line where drawing would begin at a level that is not noise."""
    sampler, objective = (build(config[group], group, config["allowed_targets"]) for group in ("sampler", "objective"))
    schedule = objective.schedule.frozen()
    level = schedule.level_at(float(sampler.grid(schedule, sampler.num_steps)[0]))
    if level.log_snr > MOST_SIGNAL:
        print(
            f"warning: sampler: drawing begins at t={level.t:.4g} with pure noise, but the model knows x_t there with "
            f"alpha={level.alpha:.2g} of the data (log-SNR {level.log_snr:.2f}): pictures will be off in brightness "
            f"and contrast. Choose a schedule or a grid whose noisy end has a log-SNR below {MOST_SIGNAL:g}",
            file=sys.stderr,
        )


def check_latents(config: Mapping[str, Any]) -> None:
    """UserError for what takes the data for pixels where they are real numbers, whose size has no bound."""
    allowed = config["allowed_targets"]
    if not build(config["data"], "data", allowed).latents:
        return
    bound = build(config["sampler"], "sampler", allowed).x_0_bound
    if bound is not None:
        raise UserError(
            f"sampler.x_0_bound={bound} would clip estimates to [-{bound}, {bound}], as of pixels, but the data are "
            "latents, which go beyond: say sampler.x_0_bound=null"
        )
    if build(config["objective"], "objective", allowed).of_pixels:
        raise UserError("objective=hybrid has the likelihood of 8-bit pixels, but the data are latents: choose another")


def check_precision(config: Mapping[str, Any], accelerator: str, key: str, method: Solver | Likelihood) -> None:
    """UserError, of the key, if the method cannot work with a network of that precision. A login node's `auto` is fp32:
    it has no GPU.
    """
    device = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    try:
        method.check(dtype_of(config["precision"], device))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def check_variance(config: Mapping[str, Any]) -> None:
    """UserError if the reverse variance reads an output of the network that the objective does not train for it."""
    allowed = config["allowed_targets"]
    objective, variance = (build(config[g], g, allowed) for g in ("objective", "variance"))
    if variance.trained_by and type(variance) is not objective.second:
        raise UserError(
            f"variance: {type(variance).__name__} reads a second output of the network, which "
            f"{type(objective).__name__} does not train for it; use variance=beta_tilde, or train with "
            f"{variance.trained_by}"
        )


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of the model's parameters, without memory for them."""
    model = Parts.of(config, device="meta").model(torch.float32)
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def check_compile(config: Mapping[str, Any]) -> None:
    """UserError if the network is to be compiled and the strategy or this machine cannot."""
    if not config["compile"]:
        return
    strategy, trainer = (build(config[g], g, config["allowed_targets"]) for g in ("strategy", "trainer"))
    if not strategy.compiles:
        raise UserError(
            "compile=true: ZeRO-3 gathers the weights of each layer as it comes to it, where a compiled graph ends: "
            "nothing would be gained; use strategy=zero2, or compile=false"
        )
    lacking = missing_for_compile(trainer.device())
    if lacking:
        raise UserError(f"compile=true: this machine lacks {lacking}; install it, or use compile=false")


def check_network(config: Mapping[str, Any], image_shape: tuple[int, int, int]) -> None:
    """UserError if the network does not take such images, or its conditioning's vector, or cannot be compiled here."""
    check_compile(config)
    parts = Parts.of(config, device="meta")
    with torch.device("meta"):
        try:
            x = torch.zeros(2, *image_shape)
            out = parts.model(torch.float32)(x, torch.zeros(2), parts.conditioning.stand_in(2))
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(
                f"network: it does not take images of {'x'.join(map(str, image_shape))} with a condition of "
                f"{parts.conditioning.dim} numbers ({str(error).splitlines()[0]})"
            ) from error
    channels = image_shape[0] * (2 if parts.objective.second else 1)
    if out.shape != (2, channels, *image_shape[1:]):
        raise UserError(
            f"network: it makes {tuple(out.shape[1:])} of images {image_shape}; with this objective it must make "
            f"{(channels, *image_shape[1:])}"
        )
