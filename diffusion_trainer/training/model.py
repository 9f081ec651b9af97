"""What is trained: a network with its conditioning, under the precision of its forward pass."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.predictions import Prediction
from diffusion_trainer.process.schedules import Schedule


class Model(nn.Module):
    """F(x, c_noise, condition), and whatever else is trained with it (`learned`). Weights stay float32; with `dtype`
    bfloat16 the forward pass is autocast to it.

    Autocast stands here, not in the trainer or in DeepSpeed's configuration, so that training, evaluation and sampling
    compute alike under every strategy, and no strategy rounds the master weights or the batch.
    """

    def __init__(
        self,
        network: nn.Module,
        conditioning: Conditioning,
        dtype: torch.dtype = torch.float32,
        learned: Sequence[nn.Module] = (),
    ):
        super().__init__()
        self.network, self.conditioning, self.dtype = network, conditioning, dtype
        self.learned = nn.ModuleList(learned)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None) -> Tensor:
        """x: (B, ...); c_noise: (B,); condition: as read by the conditioning -> (B, ...) float32."""
        exact = self.dtype == torch.float32
        with nullcontext() if exact else torch.autocast(x.device.type, self.dtype):
            return self.network(x, c_noise, self.conditioning(condition)).float()

    def denoiser(self, schedule: Schedule, prediction: Prediction) -> NetworkDenoiser:
        return NetworkDenoiser(self, self.conditioning.null, schedule, prediction)
