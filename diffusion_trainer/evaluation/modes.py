"""What `diffusion-trainer sample` can do with a model: draw, and the deterministic map between noise and images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.sampling.noise import SampleNoise
from diffusion_trainer.streaming.datamodule import ShardData, collate
from diffusion_trainer.training.module import to_pixels, to_unit


class Request(NamedTuple):
    generator: Generator
    data: ShardData  # that the model was trained on
    conditioning: Conditioning
    conditions: Tensor | None  # (n, ...) on the CPU, those asked for
    n: int
    batch_size: int


@dataclass(frozen=True)
class Answer:
    """Pictures (N, C, H, W) uint8 in rows of `columns` (None: about square), arrays for the .npz, and what to say."""

    images: Tensor
    columns: int | None
    says: str
    arrays: dict[str, Tensor] = field(default_factory=dict)


class Mode(ABC):
    prefix: ClassVar[str]  # of the names of the files that it writes

    @abstractmethod
    def __call__(self, request: Request) -> Answer:
        """UserError if the sampler cannot serve it."""


@dataclass(frozen=True)
class Draw(Mode):
    """n samples."""

    prefix: ClassVar[str] = ""

    def __call__(self, request: Request) -> Answer:
        batches = request.generator.batches(request.conditions, request.n, request.batch_size)
        images = torch.cat([to_pixels(x_0).cpu() for x_0, _ in batches])
        labels = {} if request.conditions is None else {"label": request.conditions}
        return Answer(images, None, f"{request.n} samples", labels)


@dataclass(frozen=True)
class Interpolate(Mode):
    """n rows: from sample 2i to sample 2i + 1 through spherical interpolation of their x_T (Song, Meng and Ermon 2021,
    appendix D.5), under one condition.
    """

    prefix: ClassVar[str] = "interpolate-"
    points: int = 9

    def __post_init__(self):
        if self.points < 2:
            raise ValueError(f"points must be at least 2, not {self.points}")

    def __call__(self, request: Request) -> Answer:
        generator = request.generator
        _check_deterministic(generator, "interpolate")
        rows = []
        for i in range(request.n):
            noise = SampleNoise(generator.seed, [2 * i, 2 * i + 1], generator.shape, generator.device)()
            x_T = slerp(noise[0], noise[1], torch.linspace(0, 1, self.points, device=generator.device))
            condition = None if request.conditions is None else request.conditions[[i] * self.points]
            rows.append(to_pixels(generator.map(x_T, condition)).cpu())
        says = f"{request.n} rows of {self.points} points between two samples each"
        return Answer(torch.cat(rows), self.points, says)


@dataclass(frozen=True)
class Reconstruct(Mode):
    """n images of the data to x_T and back, in each number of `steps`: how far they come back (Song, Meng and Ermon
    2021, table 2). Guidance takes no part in it.
    """

    prefix: ClassVar[str] = "reconstruct-"
    steps: Sequence[int] = (10, 20, 50, 100)

    def __post_init__(self):
        if not self.steps or min(self.steps) < 2:
            raise ValueError(f"steps must be numbers of at least 2, not {list(self.steps)}")

    def __call__(self, request: Request) -> Answer:
        _check_deterministic(request.generator, "reconstruct")
        pixels, condition = images_of(request)
        rows, errors = [pixels], []
        for count in self.steps:
            generator = request.generator.in_steps(count)
            x_0 = to_unit(pixels.to(generator.device))
            again = generator.decode(generator.encode(x_0, condition), condition)
            rows.append(to_pixels(again).cpu())
            errors.append((again - x_0).square().mean().item())
        said = ", ".join(f"{count}: {error:.2e}" for count, error in zip(self.steps, errors, strict=True))
        return Answer(
            torch.cat(rows),
            len(pixels),
            f"{len(pixels)} images (first row) and back; mean squared error by steps: {said}",
            {"steps": torch.tensor(list(self.steps)), "mean_squared_error": torch.tensor(errors)},
        )


@dataclass(frozen=True)
class Invert(Mode):
    """n images of the data, the x_T that the sampler's map takes to them, and what it makes of these. Guidance takes no
    part in it. The .npz has x_T.
    """

    prefix: ClassVar[str] = "invert-"

    def __call__(self, request: Request) -> Answer:
        _check_deterministic(request.generator, "invert")
        if request.generator.sampler.num_steps < 2:
            raise UserError("mode=invert needs at least 2 steps: sampler.num_steps=1 is the denoiser alone, no map")
        generator = request.generator
        pixels, condition = images_of(request)
        x_T = generator.encode(to_unit(pixels.to(generator.device)), condition)
        again = to_pixels(generator.decode(x_T, condition)).cpu()
        visible = to_pixels(x_T / 3).cpu()  # three standard deviations from black to white
        says = f"{len(pixels)} images, their x_T (mean {x_T.mean():.3f}, standard deviation {x_T.std():.3f}) and back"
        return Answer(torch.cat([pixels, visible, again]), len(pixels), says, {"x_T": x_T.cpu()})


def images_of(request: Request) -> tuple[Tensor, Tensor | None]:
    """The first n images of the data, (n, C, H, W) uint8, and their conditions."""
    count = min(request.n, len(request.data.samples))
    batch = collate([request.data.decode(i) for i in range(count)])
    request.conditioning.check(batch)
    return batch["image"], request.conditioning.read(batch)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """(N, ...) on the great circle from a (share 0) to b (share 1), share: (N,); a, b: of one shape."""
    angle = torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))
    if angle.sin().abs() < 1e-6:  # the same direction: the circle is a line
        return torch.lerp(a[None], b[None], share.reshape(-1, *[1] * a.dim()))
    share = share.reshape(-1, *[1] * a.dim())
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def _check_deterministic(generator: Generator, mode: str) -> None:
    if not generator.sampler.solver.deterministic:
        raise UserError(
            f"mode={mode} needs a deterministic sampler, and {type(generator.sampler.solver).__name__} as it is set "
            "draws noise on its way; use sampler=ddim (with eta 0), heun or dpmpp_2m"
        )
