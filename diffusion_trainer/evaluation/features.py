"""Feature networks that the metrics measure with."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_trainer.conventions import UserError


class Pixels(nn.Module):
    """(B, C, H, W) in [-1, 1] -> (B, C*H*W): the images themselves."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class TorchScriptFeatures(nn.Module):
    """A TorchScript file: images (B, C, H, W) in [-1, 1] -> (features (B, D), logits (B, K))."""

    def __init__(self, path: str | Path, image_shape: tuple[int, int, int], device: torch.device):
        """UserError if the file is missing, is not TorchScript, or does not take such images."""
        super().__init__()
        try:
            self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            self.net = torch.jit.load(str(path), map_location=device).eval()
            with torch.no_grad():
                features, logits = self.net(torch.zeros(1, *image_shape, device=device))
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"evaluation.features: {path} is not a TorchScript file that maps images {image_shape} to "
                f"(features, logits): {reason}. For the digits, `python data/digits.py` writes it."
            ) from error
        self.num_features, self.num_classes = features.shape[1], logits.shape[1]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features, self._logits = self.net(images)
        return features

    def classes(self) -> Tensor:
        """(B,) int64, the most probable class of each image of the last call: one pass serves both."""
        return self._logits.argmax(1)
