"""What `diffusion-trainer sample` can do with a model: draw, and the deterministic map between noise and images."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.evaluation.real import images_of
from diffusion_trainer.sampling.noise import SampleNoise
from diffusion_trainer.sampling.sampler import Sampler
from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.training.module import to_pixels, to_unit


class Request(NamedTuple):
    generator: Generator
    data: ShardData  # that the model was trained on
    conditioning: Conditioning
    conditions: Tensor | None  # (n, ...) on the CPU, those asked for
    n: int
    batch_size: int  # at most so many images at a time
    label: int | None = None  # the class asked for; None: the conditions are different ones in turn


@dataclass(frozen=True)
class Answer:
    """Pictures (N, C, H, W) uint8 in rows of `columns` (None: about square), arrays for the .npz, and what to say."""

    images: Tensor
    columns: int | None
    says: str
    arrays: dict[str, Tensor] = field(default_factory=dict)


class Mode(ABC):
    prefix: ClassVar[str]  # of the names of the files that it writes
    deterministic: ClassVar[bool] = True  # a map between noise and images, without noise and variance on the way
    guided: ClassVar[bool] = True

    def check(self, sampler: Sampler) -> None:
        """UserError if the sampler cannot serve it."""
        if self.deterministic and not sampler.solver.deterministic:
            raise UserError(
                f"{self} needs a deterministic sampler, and {type(sampler.solver).__name__} as it is set draws noise "
                "on its way; use sampler=ddim (with eta 0), heun or dpmpp_2m"
            )

    def __str__(self) -> str:
        return f"mode={type(self).__name__.lower()}"

    @abstractmethod
    def __call__(self, request: Request) -> Answer:
        """UserError if the sampler cannot serve it."""


@dataclass(frozen=True)
class Draw(Mode):
    """n samples."""

    prefix: ClassVar[str] = ""
    deterministic: ClassVar[bool] = False

    def __call__(self, request: Request) -> Answer:
        batches = request.generator.batches(request.conditions, request.n, request.batch_size)
        x_0 = torch.cat([x_0.cpu() for x_0, _ in batches])
        latents = {"latents": x_0.float()} if request.data.latents else {}  # for the autoencoder's decoder
        return Answer(to_pixels(x_0), None, f"{request.n} samples", _conditions(request) | latents)


@dataclass(frozen=True)
class Interpolate(Mode):
    """n rows, row i under condition i: from the x_T of sample 2i to that of 2i + 1 by spherical interpolation (Song,
    Meng and Ermon 2021, appendix D.5). There is nothing between two labels, so a row has one for all its points.
    """

    prefix: ClassVar[str] = "interpolate-"
    points: int = 9

    def __post_init__(self):
        if self.points < 2:
            raise ValueError(f"points must be at least 2, not {self.points}")

    def __call__(self, request: Request) -> Answer:
        generator, rows = request.generator, []
        self.check(generator.sampler)
        for i in range(request.n):
            noise = SampleNoise(generator.seed, [2 * i, 2 * i + 1], generator.shape, generator.device)()
            x_T = slerp(noise[0], noise[1], torch.linspace(0, 1, self.points, device=generator.device))
            for part in x_T.split(request.batch_size):
                condition = None if request.conditions is None else request.conditions[[i] * len(part)]
                rows.append(to_pixels(generator.map(part, condition)).cpu())
        says = f"{request.n} rows of {self.points} points between two samples each, a row under one condition"
        return Answer(torch.cat(rows), self.points, says, _conditions(request))


@dataclass(frozen=True)
class Reconstruct(Mode):
    """n images of the data to x_T and back, in each number of `steps`: how far they come back (Song, Meng and Ermon
    2021, table 2). Guidance takes no part in it.
    """

    prefix: ClassVar[str] = "reconstruct-"
    guided: ClassVar[bool] = False
    steps: Sequence[int] = (10, 20, 50, 100)

    def __post_init__(self):
        if not self.steps or min(self.steps) < 2:
            raise ValueError(f"steps must be numbers of at least 2, not {list(self.steps)}")

    def check(self, sampler: Sampler) -> None:
        super().check(sampler)
        for count in self.steps:
            try:
                replace(sampler, num_steps=count)
            except ValueError as error:
                raise UserError(f"mode.steps: {error}") from error

    def __call__(self, request: Request) -> Answer:
        self.check(request.generator.sampler)
        generators = [request.generator.in_steps(count) for count in self.steps]
        rows, errors = [[] for _ in range(1 + len(generators))], torch.zeros(len(generators), dtype=torch.float64)
        for pixels, condition in batches_of(request):
            x_0 = to_unit(pixels)
            rows[0].append(pixels.cpu())
            for k, generator in enumerate(generators):
                again = generator.decode(generator.encode(x_0, condition), condition)
                rows[k + 1].append(to_pixels(again).cpu())
                errors[k] += (again - x_0).double().square().sum().item()
        rows = [torch.cat(row) for row in rows]
        errors, n = errors / rows[0].numel(), len(rows[0])
        said = ", ".join(f"{count}: {error:.2e}" for count, error in zip(self.steps, errors.tolist(), strict=True))
        return Answer(
            torch.cat(rows),
            n,
            f"{n} images (first row) and back; mean squared error by steps: {said}",
            {"steps": torch.tensor(list(self.steps)), "mean_squared_error": errors},
        )


@dataclass(frozen=True)
class Invert(Mode):
    """n images of the data, the x_T that the sampler's map takes to them, and what it makes of these. Guidance takes no
    part in it. The .npz has x_T.
    """

    prefix: ClassVar[str] = "invert-"
    guided: ClassVar[bool] = False

    def check(self, sampler: Sampler) -> None:
        super().check(sampler)
        if sampler.num_steps < 2:
            raise UserError(f"{self} needs at least 2 steps: sampler.num_steps=1 is the denoiser alone, no map")

    def __call__(self, request: Request) -> Answer:
        generator, images, noises, again = request.generator, [], [], []
        self.check(generator.sampler)
        for pixels, condition in batches_of(request):
            x_T = generator.encode(to_unit(pixels), condition)
            again.append(to_pixels(generator.decode(x_T, condition)).cpu())
            images.append(pixels.cpu())
            noises.append(x_T.cpu())
        x_T = torch.cat(noises)
        visible = to_pixels(x_T / 3)  # three standard deviations from black to white
        says = f"{len(x_T)} images, their x_T (mean {x_T.mean():.3f}, standard deviation {x_T.std():.3f}) and back"
        return Answer(torch.cat([*images, visible, *again]), len(x_T), says, {"x_T": x_T})


def batches_of(request: Request) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The first n images of the data (of the label asked for, if one is) and their conditions: (B, C, H, W) uint8, on
    the generator's device. UserError if there are none.
    """
    data = request.data.numbered()
    if request.label is None:
        numbers = list(range(min(request.n, data.count)))
    else:
        numbers = list(islice(data.labelled(request.label), request.n))
    if not numbers:
        raise UserError(f"label={request.label}: the data has no image of it")
    for first in range(0, len(numbers), request.batch_size):
        part = numbers[first : first + request.batch_size]
        yield images_of(request.data, part, request.conditioning, request.generator.device)


def _conditions(request: Request) -> dict[str, Tensor]:
    return dict.fromkeys(request.conditioning.fields, request.conditions)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """(N, ...) on the great circle from a (share 0) to b (share 1), share: (N,); a, b: of one shape."""
    angle = torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))
    if angle.sin().abs() < 1e-6:  # the same direction: the circle is a line
        return torch.lerp(a[None], b[None], share.reshape(-1, *[1] * a.dim()))
    share = share.reshape(-1, *[1] * a.dim())
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
