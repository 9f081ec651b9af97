"""What is measured, on which samples, against which reference; with the provenance of every number."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusion_trainer.evaluation.features import Pixels, TorchScriptFeatures
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.module import to_pixels, to_unit


class Interrupted(Exception):
    """The evaluation was told to stop."""


@dataclass(frozen=True)
class Evaluation:
    """Frechet distances of generated samples to real ones, and how many are recognised as the class asked for.

    reference: the real images; sample i is asked for the label of reference i (and again from the start when there are
    more samples). features: a TorchScript file (see evaluation.features). num_samples null: as many as the reference.
    """

    reference: ShardData
    features: str
    num_samples: int | None = None
    batch_size: int = 300
    seed: int = 1

    def __post_init__(self):
        if self.num_samples is not None and self.num_samples < 2:
            raise ValueError(f"num_samples must be at least 2 (a covariance), not {self.num_samples}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {self.batch_size}")

    def prepare(self, device: torch.device, agreement: Agreement) -> "Prepared":
        """Reads the reference once, each rank its share."""
        return Prepared(self, device, agreement)


class Prepared:
    """An evaluation with its reference statistics, on the ranks of an agreement."""

    def __init__(self, evaluation: Evaluation, device: torch.device, agreement: Agreement):
        self.evaluation, self.device, self.agreement = evaluation, device, agreement
        data = evaluation.reference
        self.net = TorchScriptFeatures(evaluation.features, data.image_shape, device)
        pixels = Pixels(torch.Size(data.image_shape).numel())
        self.distances = {
            "fid": FrechetInceptionDistance(self.net, reset_real_features=False).to(device),
            "pixel_fd": FrechetInceptionDistance(pixels, reset_real_features=False).to(device),
        }
        labels, digest = [], 0
        for batch in data.once(evaluation.batch_size, agreement.rank, agreement.world):
            self._update(to_unit(batch["image"].to(device)), real=True)
            labels += batch.get("label", torch.empty(0)).tolist()
            digest += sum(int.from_bytes(hashlib.sha256(x.numpy().tobytes()).digest()) for x in batch["image"])
        shares = agreement.gather((labels, digest))
        # A sum of hashes: the same however the images are dealt over ranks.
        self.reference_digest = f"{sum(d for _, d in shares) % 2**256:064x}"
        self.labels: list[int] | None = _interleave([share for share, _ in shares]) if "label" in data.entries else None

    @property
    def count(self) -> int:
        return self.evaluation.num_samples or self.evaluation.reference.count

    def _update(self, images: Tensor, real: bool) -> None:
        for distance in self.distances.values():
            distance.update(images, real=real)

    def conditions(self) -> Tensor | None:
        """(count,) int64, the label asked of each sample; None without labels."""
        if self.labels is None:
            return None
        return torch.tensor([self.labels[i % len(self.labels)] for i in range(self.count)])

    def __call__(
        self, generator: Generator, conditional: bool, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """The metrics, equal on all ranks, which must all call it. Raises Interrupted when stop() says so on any.

        conditional: whether the model reads labels; one that does not is not asked for any.

        Images are rounded to 8 bits first: the numbers are those of the files one would save.
        """
        for distance in self.distances.values():
            distance.reset()
        conditions, right = self.conditions() if conditional else None, 0
        work = generator.batches(
            conditions, self.count, self.evaluation.batch_size, self.agreement.rank, self.agreement.world
        )
        for x_0, numbers in work:
            if self.agreement.any(stop()):
                raise Interrupted
            if not numbers:
                continue  # all padding: this rank drew for the others' sake
            self._update(to_unit(to_pixels(x_0)), real=False)
            if conditions is not None:
                right += int((self.net.classes().cpu() == conditions[torch.tensor(numbers)]).sum())
        metrics = {name: float(distance.compute()) for name, distance in self.distances.items()}
        if conditions is not None:
            metrics["accuracy"] = sum(self.agreement.gather(right)) / self.count
        return metrics

    def provenance(self) -> dict:
        """What the numbers were measured with."""
        e = self.evaluation
        return {
            "num_samples": self.count,
            "seed": e.seed,
            "reference": {
                "shards": e.reference.shards,
                "num_images": e.reference.count,
                "digest": self.reference_digest,
            },
            "features": {"file": e.features, "sha256": self.net.digest},
        }


def _interleave(shares: Sequence[Sequence[int]]) -> list[int]:
    """Rank r of W has items r, r + W, ...; back in their order."""
    out = [0] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        out[rank :: len(shares)] = share
    return out
