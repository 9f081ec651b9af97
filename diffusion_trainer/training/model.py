"""What is trained: a network with its conditioning, under the precision of its forward pass."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.predictions import Prediction
from diffusion_trainer.process.schedules import Schedule


class Model(nn.Module):
    """F(x, c_noise, condition), and whatever else is trained with it (`learned`). Weights stay float32; with `dtype`
    bfloat16 or float16 the forward pass is autocast to it.

    Autocast stands here, not in the trainer or in DeepSpeed's configuration, so that training, evaluation and sampling
    compute alike under every strategy, and no strategy rounds the master weights or the batch.

    channels_last: images go through the network in that memory format; its weights are stored as ever.
    compiled: the network is compiled as one graph when it is first called, in place: names of weights stay.
    """

    def __init__(
        self,
        network: nn.Module,
        conditioning: Conditioning,
        dtype: torch.dtype = torch.float32,
        learned: Sequence[nn.Module] = (),
        channels_last: bool = False,
        compiled: bool = False,
    ):
        super().__init__()
        self.network, self.conditioning, self.dtype = network, conditioning, dtype
        self.learned, self.channels_last = nn.ModuleList(learned), channels_last
        if compiled:
            # Whole, not block by block: most blocks of a U-Net have their own shape, so little would be shared, and
            # torch makes their channels symbols, which inductor of 2.13 fails on. The second batch size it meets
            # makes the graph of all sizes, a much smaller one the last: other batches compile no more.
            network.compile()

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None) -> Tensor:
        """x: (B, ...); c_noise: (B,); condition: as read by the conditioning -> (B, ...) float32."""
        exact = self.dtype == torch.float32
        if self.channels_last and x.dim() == 4:
            # Convolutions of a U-Net run 1.3 times as fast on a CPU, and tensor cores want it too. (Images of one
            # channel have both formats at once, and torch takes them for its own.)
            x = x.contiguous(memory_format=torch.channels_last)
        with nullcontext() if exact else torch.autocast(x.device.type, self.dtype):
            return self.network(x, c_noise, self.conditioning(condition)).float()

    def denoiser(self, schedule: Schedule, prediction: Prediction) -> NetworkDenoiser:
        return NetworkDenoiser(self, self.conditioning.null, schedule, prediction, self.dtype)


def missing_for_compile(device: str) -> str | None:
    """What this machine lacks for a compiled network on `device` cpu or cuda; None if nothing.

    On a CPU torch builds the kernels with a C++ compiler, on a GPU Triton builds what launches them with a C compiler.
    """
    if device == "cuda":
        variable, usual = "CC", ["gcc", "clang", "cc"]
    else:
        variable, usual = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    named = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(map(shutil.which, named)):
        return f"a compiler ({' or '.join(named)}; the environment variable {variable} names another)"
    if device == "cuda" and find_spec("triton") is None:
        return "the package triton"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.is_file() else f"Python's headers ({header})"
