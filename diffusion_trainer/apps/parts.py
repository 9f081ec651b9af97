"""The objects that a checked configuration describes, and the checks that need more than one of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from diffusion_trainer.apps.nodes import Schema, build
from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.conventions import UserError
from diffusion_trainer.process.predictions import Prediction
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.training.model import Model


class TrainConfig(Schema):
    """The top level of conf/train.yaml."""

    name: str
    folder: str
    seed: int
    num_images: int
    batch_size: int
    lanes: int
    precision: Literal["auto", "fp32", "bf16"]
    condition_dropout: float
    allowed_targets: list[str]
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
    guidance: dict
    evaluation: dict | None
    callbacks: dict
    logger: dict
    strategy: dict
    trainer: dict


def dtype_of(precision: str, device: str) -> torch.dtype:
    """auto is bf16 on GPUs that compute in it, fp32 elsewhere. fp32 means it: cuDNN's TF32 is switched off."""
    torch.backends.cudnn.allow_tf32 = False
    bf16 = precision == "bf16" or (precision == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())
    return torch.bfloat16 if bf16 else torch.float32


@dataclass(frozen=True)
class Parts:
    """What training, sampling and evaluation have in common."""

    schedule: Schedule
    prediction: Prediction
    network: nn.Module
    conditioning: Conditioning

    @classmethod
    def of(cls, config: Mapping[str, Any], seed: int = 0) -> "Parts":
        """Builds network and conditioning with weights that depend on the seed alone."""
        allowed = config.get("allowed_targets", ())
        torch.manual_seed(seed)
        return cls(
            *(build(config[name], name, allowed) for name in ("schedule", "prediction", "network", "conditioning"))
        )

    def model(self, dtype: torch.dtype) -> Model:
        return Model(self.network, self.conditioning, dtype)


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of the model's parameters, without memory for them."""
    with torch.device("meta"):
        model = Parts.of(config).model(torch.float32)
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def check_network(config: Mapping[str, Any], image_shape: tuple[int, int, int]) -> None:
    """UserError if the network does not take such images, or its conditioning's vector."""
    with torch.device("meta"):
        parts = Parts.of(config)
        try:
            x = torch.zeros(2, *image_shape)
            labels = torch.zeros(2, dtype=torch.int64) if parts.conditioning.fields else None
            out = parts.model(torch.float32)(x, torch.zeros(2), labels)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(
                f"network: it does not take images of {'x'.join(map(str, image_shape))} with a condition of "
                f"{parts.conditioning.dim} numbers ({str(error).splitlines()[0]})"
            ) from error
    if out.shape != x.shape:
        raise UserError(f"network: it makes {tuple(out.shape[1:])} of images {image_shape}; the shapes must be equal")
