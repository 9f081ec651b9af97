"""Sample i is a function of (seed, i): not of the batch it is drawn in, the rank, or the number of ranks."""

from dataclasses import dataclass, field
from math import ceil

import pytest
import torch
from cases import each

from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.schedules import Cosine
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.ddim import DDIM
from diffusion_trainer.sampling.grids import UniformTime
from diffusion_trainer.sampling.guidance import ClassifierFree
from diffusion_trainer.sampling.noise import SampleNoise
from diffusion_trainer.sampling.sampler import Sampler

CPU, SHAPE, COUNT = torch.device("cpu"), (2, 4, 4), 10
CONDITIONS = torch.arange(COUNT) % 3
every_batch_size = each("batch_size", [1, 3, 7])
every_world = each("world", [1, 2, 3])


@dataclass(frozen=True)
class Cheap(Denoiser):
    """Elementwise, so that a sample's numbers cannot depend on its neighbours; counts its calls."""

    calls: list[int] = field(default_factory=list)

    def __call__(self, x_t, level, condition):
        self.calls.append(len(x_t))
        return Estimate(0.5 * x_t if condition is None else 0.5 * x_t + 0.1 * condition[:, None, None, None])

    def null(self, condition):
        return None if condition is None else torch.full_like(condition, -1)


def generator(seed=0):
    sampler = Sampler(DDIM(1.0), UniformTime(), 4)
    return Generator(Cheap(), Cosine(), sampler, FixedSmall(), ClassifierFree(2.0), SHAPE, CPU, seed)


def images(batch_size, world, count=COUNT, conditions=CONDITIONS, seed=0):
    """Number -> image, gathered over the ranks; and how often each rank called the denoiser."""
    by_number, calls = {}, []
    conditions = None if conditions is None else conditions[:count]
    for rank in range(world):
        g = generator(seed)
        for x_0, numbers in g.batches(conditions, count, batch_size, rank, world):
            assert len(x_0) == len(numbers) <= batch_size
            assert not by_number.keys() & set(numbers)
            by_number.update(zip(numbers, x_0, strict=True))
        calls.append(len(g.denoiser.calls))
    return by_number, calls


@pytest.fixture(scope="module")
def alone():
    """Number -> image, each drawn in a batch of its own."""
    return {i: generator().draw([i], CONDITIONS[[i]])[0] for i in range(COUNT)}


@every_batch_size
@every_world
def test_images_do_not_depend_on_the_batch_nor_on_the_ranks(alone, batch_size, world):
    by_number, _ = images(batch_size, world)
    assert sorted(by_number) == list(range(COUNT))  # each exactly once: `images` refuses a second
    assert all(torch.equal(by_number[i], alone[i]) for i in range(COUNT))


@every_batch_size
@every_world
@pytest.mark.parametrize("count", [1, 2, 9, 10])
def test_every_rank_calls_the_denoiser_equally_often(batch_size, world, count):
    by_number, calls = images(batch_size, world, count)
    assert sorted(by_number) == list(range(count))
    assert len(set(calls)) == 1
    assert calls[0] == 4 * ceil(ceil(count / world) / batch_size)  # four steps of each batch of a share


def test_images_differ_by_number_and_by_seed(alone):
    assert len({tuple(image.flatten().tolist()) for image in alone.values()}) == COUNT
    other, _ = images(7, 1, seed=1)
    assert not any(torch.equal(other[i], alone[i]) for i in range(COUNT))


def test_each_image_has_its_own_condition(alone):
    shifted, _ = images(3, 2, conditions=(CONDITIONS + 1) % 3)
    assert not any(torch.equal(shifted[i], alone[i]) for i in range(COUNT))


@every_world
def test_unconditional_images_do_not_depend_on_the_ranks(world):
    one_rank, _ = images(3, 1, conditions=None)
    shared, _ = images(3, world, conditions=None)
    assert all(torch.equal(one_rank[i], shared[i]) for i in range(COUNT))


def test_noise_of_a_sample_does_not_depend_on_its_company():
    together, single = SampleNoise(0, [5, 2, 9], SHAPE, CPU), SampleNoise(0, [2], SHAPE, CPU)
    for _ in range(3):
        assert torch.equal(together()[1], single()[0])


def test_noise_is_standard_normal_and_independent_between_samples_and_calls():
    noise = SampleNoise(0, range(200), (100,), CPU)
    first, second = noise(), noise()
    n = first.numel()
    for z in (first, second):
        assert abs(z.mean()) < 5 / n**0.5
        assert abs(z.square().mean() - 1) < 5 * (2 / n) ** 0.5
    for other in (second, first.roll(1, 0), SampleNoise(1, range(200), (100,), CPU)()):
        assert abs((first * other).mean()) < 5 / n**0.5
