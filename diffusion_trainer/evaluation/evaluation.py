"""What is measured, on which samples, against which reference; with the provenance of every number."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusion_trainer.conditioning.base import Conditioning
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

    reference: the real images; sample i is asked for the condition of reference i (and again from the start when there
    are more samples), and recognised if it is of that one's class. features: a TorchScript file (see
    evaluation.features). num_samples null: as many as the reference.
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

    def prepare(self, device: torch.device, agreement: Agreement, conditioning: Conditioning) -> "Prepared":
        """Reads the reference once, each rank its share. UserError for a condition that the model does not know."""
        return Prepared(self, device, agreement, conditioning)


class Prepared:
    """An evaluation with its reference statistics, on the ranks of an agreement."""

    def __init__(self, evaluation: Evaluation, device: torch.device, agreement: Agreement, conditioning: Conditioning):
        self.evaluation, self.device, self.agreement = evaluation, device, agreement
        data = evaluation.reference
        self.net = TorchScriptFeatures(evaluation.features, data.image_shape, device)
        pixels = Pixels(torch.Size(data.image_shape).numel())
        self.distances = {
            "fid": FrechetInceptionDistance(self.net, reset_real_features=False).to(device),
            "pixel_fd": FrechetInceptionDistance(pixels, reset_real_features=False).to(device),
        }
        labels, conditions, digest = [], [], 0
        for batch in data.once(evaluation.batch_size, agreement.rank, agreement.world):
            self._update(to_unit(batch["image"].to(device)), real=True)
            conditioning.check(batch)
            labels.append(batch.get("label"))
            conditions.append(conditioning.read(batch))
            digest += sum(int.from_bytes(hashlib.sha256(x.numpy().tobytes()).digest()) for x in batch["image"])
        shares = agreement.gather((_joined(labels), _joined(conditions), digest))
        # A sum of hashes: the same however the images are dealt over ranks.
        self.reference_digest = f"{sum(share[2] for share in shares) % 2**256:064x}"
        self._labels, self._conditions = (_interleave([share[part] for share in shares]) for part in (0, 1))

    @property
    def count(self) -> int:
        return self.evaluation.num_samples or self.evaluation.reference.count

    def _update(self, images: Tensor, real: bool) -> None:
        for distance in self.distances.values():
            distance.update(images, real=real)

    def conditions(self) -> Tensor | None:
        """(count, ...) on the CPU, the condition asked of each sample; None if the model reads none."""
        return self._of_each_sample(self._conditions)

    def _of_each_sample(self, of_references: Tensor | None) -> Tensor | None:
        return None if of_references is None else of_references[torch.arange(self.count) % len(of_references)]

    def __call__(self, generator: Generator, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """The metrics, equal on all ranks, which must all call it. Raises Interrupted when stop() says so on any.

        Images are rounded to 8 bits first: the numbers are those of the files one would save.
        """
        for distance in self.distances.values():
            distance.reset()
        conditions, right = self.conditions(), 0
        # Without a condition the model cannot know what class it is asked for.
        labels = None if conditions is None else self._of_each_sample(self._labels)
        work = generator.batches(
            conditions, self.count, self.evaluation.batch_size, self.agreement.rank, self.agreement.world
        )
        for x_0, numbers in work:
            if self.agreement.any(stop()):
                raise Interrupted
            if not numbers:
                continue  # all padding: this rank drew for the others' sake
            self._update(to_unit(to_pixels(x_0)), real=False)
            if labels is not None:
                right += int((self.net.classes().cpu() == labels[torch.tensor(numbers)]).sum())
        metrics = {name: float(distance.compute()) for name, distance in self.distances.items()}
        if labels is not None:
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


def _joined(batches: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor of all; None if they are none, or there are none (the share of a rank of more ranks than images)."""
    return torch.cat(list(batches)) if batches and batches[0] is not None else None


def _interleave(shares: Sequence[Tensor | None]) -> Tensor | None:
    """Rank r of W has items r, r + W, ...; back in their order."""
    if shares[0] is None:  # the first rank has some if there are any
        return None
    items = [share for share in shares if share is not None]
    out = items[0].new_empty(sum(map(len, items)), *items[0].shape[1:])
    for rank, share in enumerate(items):
        out[rank :: len(shares)] = share
    return out
