"""A class label, with a null class for classifier-free guidance."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.conventions import UserError


class ClassLabel(Conditioning):
    """Embeds labels 0..num_classes-1; number num_classes is the null class and has a row of its own."""

    fields = ("label",)

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        if num_classes < 1 or dim < 1:
            raise ValueError(f"num_classes and dim must be positive, not {num_classes} and {dim}")
        self.num_classes, self.dim = num_classes, dim
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def check(self, batch: Mapping[str, Tensor]) -> None:
        label = batch["label"]
        wrong = label[(label < 0) | (label >= self.num_classes)]
        if len(wrong):
            raise UserError(
                f"label {int(wrong[0])} is out of range: the model has {self.num_classes} classes, "
                f"0 to {self.num_classes - 1} (conditioning.num_classes)"
            )

    def examples(self, count: int) -> Tensor:
        return torch.arange(count) % self.num_classes

    def stand_in(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def read(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["label"]

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        return torch.where(dropped, self.num_classes, condition)

    def null(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.num_classes)

    def forward(self, condition: Tensor) -> Tensor:
        return self.embedding(condition)
