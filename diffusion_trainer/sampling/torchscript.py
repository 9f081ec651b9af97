"""Networks of other people's making, as TorchScript files, and what one shows them: read once for each device."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_trainer.conventions import UserError


@dataclass(frozen=True)
class TorchScript:
    """A network of so many inputs, evaluated, not trained. `what` it should be is for the UserErrors of its use."""

    path: str
    inputs: int
    what: str

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        network = _load(self, inputs[0].device)
        try:
            # TorchScript's optimizer would rewrite the network after its first call, and so change the last bits.
            with torch.jit.optimized_execution(False):
                return network(*inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in inputs)
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{self.path} does not take {shapes} ({reason}); it should be {self.what}") from error


@cache
def _load(file: TorchScript, device: torch.device) -> torch.jit.ScriptModule:
    if not Path(file.path).is_file():
        raise UserError(f"{file.path}: there is no such file; it should be a TorchScript file of {file.what}")
    try:
        network = torch.jit.load(file.path, map_location=device)
    except RuntimeError as error:
        raise UserError(f"{file.path} is not a TorchScript file; it should be one of {file.what}") from error
    arguments = network.forward.schema.arguments[1:]  # without self
    required = sum(not a.has_default_value() for a in arguments)
    if not required <= file.inputs <= len(arguments):
        raise UserError(f"{file.path} takes {required} inputs, not {file.inputs}; it should be {file.what}")
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def last(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[-1] if isinstance(output, tuple) else output


def read_reference(path: str, channels: int) -> Tensor:
    """What a .npy file holds, with a batch dimension of one before it; or a picture, (1, channels, H, W) in [-1, 1]."""
    try:
        if Path(path).suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))[None]
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.float32)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); it should be a picture or an array in a .npy file"
        ) from error
    return (torch.from_numpy(pixels) / 127.5 - 1).reshape(1, *pixels.shape[:2], -1).movedim(-1, 1)
