"""What `sample` can do besides drawing: great circles between noises, and the map from images to noise and back."""

from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from options import built
from torch.testing import assert_close

from diffusion_trainer.conditioning.class_label import ClassLabel
from diffusion_trainer.conditioning.unconditional import Unconditional
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.generate import Generator
from diffusion_trainer.evaluation.modes import Draw, Interpolate, Invert, Reconstruct, Request, images_of, slerp
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.guidance import NoGuidance
from diffusion_trainer.streaming.datamodule import ShardData
from diffusion_trainer.training.module import to_unit

COSINE, SAMPLERS = built("schedule")["cosine"], built("sampler")
CPU, SHAPE = torch.device("cpu"), (1, 8, 8)
DETERMINISTIC = ["ddim", "heun", "dpmpp_2m", "euler"]


@dataclass(frozen=True)
class Toy(Denoiser):
    """Exact for N(mean of the class, 0.2 I): its flow is smooth, and different for each class."""

    def __call__(self, x_t, level, condition):
        mean = 0.0 if condition is None else (condition.to(x_t) / 10 - 0.5)[:, None, None, None]
        gain = level.alpha * 0.2 / (level.alpha**2 * 0.2 + level.sigma**2)
        return Estimate(mean + gain * (x_t - level.alpha * mean))

    def null(self, condition):
        return condition


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.overrides(folder)
    return ShardData(f"{folder}/tiny/train-*.tar", 1, 8, 8)


def request(data, n=4, sampler="ddim", num_steps=20, labels=True, batch_size=3):
    chosen = replace(SAMPLERS[sampler], num_steps=num_steps, x_0_bound=None)
    generator = Generator(Toy(), COSINE, chosen, FixedSmall(), NoGuidance(), SHAPE, CPU, 5)
    conditioning = ClassLabel(10, 4) if labels else Unconditional()
    return Request(generator, data, conditioning, conditioning.examples(n), n, batch_size)


def test_slerp_of_unit_vectors_is_of_unit_length_and_turns_evenly():
    a, b = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = a / a.norm(), b / b.norm()
    share = torch.linspace(0, 1, 9, dtype=torch.float64)
    path = slerp(a, b, share)
    assert path.shape == (9, 3, 4, 5)
    assert_close(path.flatten(1).norm(dim=1), torch.ones(9, dtype=torch.float64))
    assert_close(path[0], a)
    assert_close(path[-1], b)
    angles = (path[1:] * path[:-1]).flatten(1).sum(1).acos()
    assert_close(angles, angles.mean().expand(8), rtol=1e-6, atol=0)
    assert_close(angles.sum(), (a * b).sum().acos(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1.0, 2.0, 1 + 1e-4])
def test_slerp_of_parallel_vectors_is_the_line_between_them(dtype, factor):
    a = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    share = torch.linspace(0, 1, 5, dtype=dtype)
    path = slerp(a, factor * a, share)
    assert path.isfinite().all()
    assert_close(path, torch.lerp(a[None], factor * a[None], share[:, None, None, None]), rtol=1e-3, atol=1e-3)


def test_slerp_of_opposite_vectors_keeps_its_ends():
    a = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = slerp(a, -a, torch.linspace(0, 1, 3, dtype=torch.float64))
    assert path.isfinite().all()
    assert_close(path[[0, 2]], torch.stack([a, -a]))


def test_slerp_of_independent_noise_keeps_its_size():
    """Which is why it is not a line: half way on a line the noise has 0.7 of its standard deviation."""
    a, b = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert slerp(a, b, torch.tensor([0.5])).std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("labels", [True, False])
def test_draw_gives_the_samples_of_the_generator_and_their_labels(data, labels):
    asked = request(data, n=7, labels=labels)
    answer = Draw()(asked)
    assert (answer.images.shape, answer.images.dtype) == ((7, *SHAPE), torch.uint8)
    assert answer.columns is None
    assert list(answer.arrays) == (["label"] if labels else [])
    assert torch.equal(answer.images, Draw()(asked._replace(batch_size=100)).images)  # whatever the batches
    assert torch.equal(answer.images[:3], Draw()(request(data, n=3, labels=labels)).images)


@pytest.mark.parametrize("labels", [True, False])
def test_interpolation_goes_from_one_sample_to_another_in_rows(data, labels):
    asked = request(data, n=3, labels=labels)
    answer = Interpolate(points=5)(asked)
    assert (answer.images.shape, answer.images.dtype, answer.columns) == ((15, *SHAPE), torch.uint8, 5)
    rows = answer.images.unflatten(0, (3, 5)).int()
    for i in range(3):
        condition = None if asked.conditions is None else asked.conditions[[i, i]]
        ends = to_unit_of(asked.generator.draw([2 * i, 2 * i + 1], condition))
        assert (rows[i][[0, -1]] - ends).abs().max() <= 1
        steps = rows[i].diff(dim=0).abs().flatten(1).float().mean(1)
        assert steps.max() < 4 * steps.min()  # no jump
    assert len({rows[i][0].sum().item() for i in range(3)}) == 3


def to_unit_of(x_0):
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().int()


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_reconstruction_error_falls_with_the_steps(data, sampler):
    steps = (10, 20, 40)
    answer = Reconstruct(steps)(request(data, n=3, sampler=sampler))
    assert (answer.images.shape, answer.images.dtype, answer.columns) == ((12, *SHAPE), torch.uint8, 3)
    assert answer.arrays["steps"].tolist() == list(steps)
    errors = answer.arrays["mean_squared_error"]
    assert (errors.diff() < 0).all()
    assert errors[-1] < errors[0] / 4  # first order at least: the square falls by 16
    pixels, _ = images_of(request(data, n=3))
    assert torch.equal(answer.images[:3], pixels)
    assert f"40: {errors[-1].item():.2e}" in answer.says


def test_each_image_is_taken_back_under_its_own_condition(data):
    """Another label would be another flow, and the error that of the difference between their means."""
    asked = request(data, n=4, num_steps=50)
    pixels, condition = images_of(asked)
    x_0 = to_unit(pixels)
    x_T = asked.generator.encode(x_0, condition)
    assert_close(asked.generator.decode(x_T, condition), x_0, rtol=0, atol=0.15)
    assert (asked.generator.decode(x_T, (condition + 5) % 10) - x_0).abs().max() > 0.3
    assert condition.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("labels", [True, False])
def test_inversion_gives_a_noise_that_makes_the_image_again(data, labels):
    asked = request(data, n=4, sampler="heun", num_steps=60, labels=labels)
    answer = Invert()(asked)
    assert (answer.images.shape, answer.images.dtype, answer.columns) == ((12, *SHAPE), torch.uint8, 4)
    x_T, pixels = answer.arrays["x_T"], answer.images[:4].int()
    assert x_T.shape == (4, *SHAPE)
    assert (answer.images[8:].int() - pixels).abs().float().mean() < 3
    again = to_unit_of(asked.generator.decode(x_T, images_of(asked)[1]))
    assert (again - answer.images[8:].int()).abs().max() <= 1
    # The flow of N(m, 0.2 I) is affine: x_T is (x_0 - m) / sqrt(0.2), up to what little signal the noisy end has.
    mean = 0.0 if not labels else (torch.arange(4) / 10 - 0.5)[:, None, None, None]
    assert_close(x_T, (to_unit(pixels) - mean) / 0.2**0.5, rtol=0, atol=0.1)


def test_more_images_than_there_are_is_all_of_them(data):
    assert len(images_of(request(data, n=1000))[0]) == 100


@pytest.mark.parametrize("mode", [Interpolate(), Reconstruct(), Invert()], ids=lambda m: type(m).__name__.lower())
@pytest.mark.parametrize("sampler", ["ancestral", "euler_ancestral", "euler_maruyama", "dpmpp_sde_2m"])
def test_samplers_that_draw_noise_are_refused_by_name(data, mode, sampler):
    solver = type(SAMPLERS[sampler].solver).__name__
    with pytest.raises(UserError, match=rf"mode={type(mode).__name__.lower()} needs .*, and {solver}"):
        mode(request(data, sampler=sampler))


def test_a_label_that_the_model_does_not_have_is_refused(data):
    asked = request(data, n=100)._replace(conditioning=ClassLabel(5, 4))
    with pytest.raises(UserError, match="label 5 is out of range"):
        Invert()(asked)


def test_conf_has_the_modes_as_they_are():
    assert built("mode") == {
        "draw": Draw(), "interpolate": Interpolate(9), "invert": Invert(), "reconstruct": built("mode")["reconstruct"],
    }  # fmt: skip
    assert tuple(built("mode")["reconstruct"].steps) == Reconstruct().steps


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="points"):
        Interpolate(1)
    for steps in ((), (1, 10)):
        with pytest.raises(ValueError, match="steps"):
            Reconstruct(steps)
