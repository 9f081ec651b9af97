"""The seam of data: where a run's batches come from."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

import torch

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.fields import Decoder, Field
from diffusion_trainer.streaming.loader import Layout, Loader


class Data(ABC):
    """What a configuration's group `data` builds."""

    fields: Mapping[str, Field | None]  # of a batch, by name; null leaves one out. `image` is what is modelled
    damage_budget: float  # the share of the samples that may be damaged before a run stops

    @cached_property
    def entries(self) -> dict[str, Field]:
        """The fields of a batch."""
        return {name: field for name, field in self.fields.items() if field is not None}

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.entries)

    @property
    def image_shape(self) -> tuple[int, ...]:
        image = self.entries["image"]
        return tuple(image.present(torch.empty(1, *image.stored, device="meta")).shape[1:])

    @property
    def latents(self) -> bool:
        """Whether its images are an autoencoder's real numbers, of any size, and not pixels in [-1, 1]."""
        return "float" in str(self.entries["image"].dtype)

    @property
    def image_shapes(self) -> list[tuple[int, ...]]:
        """Of all the batches that may come."""
        return [self.image_shape]

    def check_fields(self) -> None:
        """ValueError for what no run can use."""
        if self.fields.get("image") is None or self.fields["image"].stored is None:
            raise ValueError("fields.image is missing: it is what the model learns")
        if not 0 <= self.damage_budget < 1:
            raise ValueError(f"damage_budget is a share, at least 0 and less than 1, not {self.damage_budget}")

    @property
    @abstractmethod
    def fingerprint(self) -> str | None:
        """Of all in the data that the order of samples depends on; None if there is no lasting order."""

    @property
    @abstractmethod
    def count(self) -> int | None:
        """Samples there are; None if nobody knows."""

    def numbered(self) -> "Data":
        """Itself, if each of its samples can be had by its number; else UserError."""
        raise UserError("these data have no index and so no numbered samples, which this needs; choose data=shards")

    @abstractmethod
    def first(self, count: int) -> dict:
        """Some samples as a batch, before training; UserError if they cannot be had."""

    @abstractmethod
    def loader(self, layout: Layout, seed: int, lanes: int, first_step: int, last_step: int) -> Loader:
        """This rank's pieces of global batches first_step..last_step-1, in order."""
