"""Real images by number, as a model takes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.streaming.data import ShardData


def images_of(
    data: ShardData, numbers: Sequence[int], conditioning: Conditioning, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(B, C, H, W), uint8 pixels or latents, and their conditions, on the device; UserError for a condition that the
    model does not know.
    """
    batch = data.batch(numbers)
    conditioning.check(batch)
    needed = {name: batch[name].to(device) for name in ("image", *conditioning.fields)}
    return needed["image"], conditioning.read(needed)
