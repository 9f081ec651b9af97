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
from diffusion_trainer.evaluation.modes import Draw, Interpolate, Invert, Reconstruct, Request, batches_of
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.guidance import NoGuidance
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
    return tiny.data(folder)


def request(data, n=4, sampler="ddim", num_steps=20, labels=True, batch_size=3):
    chosen = replace(SAMPLERS[sampler], num_steps=num_steps, x_0_bound=None)
    generator = Generator(Toy(), COSINE, chosen, FixedSmall(), NoGuidance(), SHAPE, CPU, 5)
    conditioning = ClassLabel(10, 4) if labels else Unconditional()
    return Request(generator, data, conditioning, conditioning.examples(n), n, batch_size)


def real(asked):
    """All the images that a request means, and their conditions."""
    pixels, conditions = zip(*batches_of(asked), strict=True)
    return torch.cat(pixels), None if conditions[0] is None else torch.cat(conditions)


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
    pixels, _ = real(request(data, n=3))
    assert torch.equal(answer.images[:3], pixels)
    assert f"40: {errors[-1].item():.2e}" in answer.says


def test_each_image_is_taken_back_under_its_own_condition(data):
    """Another label would be another flow, and the error that of the difference between their means."""
    asked = request(data, n=4, num_steps=50)
    pixels, condition = real(asked)
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
    again = to_unit_of(asked.generator.decode(x_T, real(asked)[1]))
    assert (again - answer.images[8:].int()).abs().max() <= 1
    # The flow of N(m, 0.2 I) is affine: x_T is (x_0 - m) / sqrt(0.2), up to what little signal the noisy end has.
    mean = 0.0 if not labels else (torch.arange(4) / 10 - 0.5)[:, None, None, None]
    assert_close(x_T, (to_unit(pixels) - mean) / 0.2**0.5, rtol=0, atol=0.1)


def test_more_images_than_there_are_is_all_of_them(data):
    assert len(real(request(data, n=1000))[0]) == 100


@pytest.mark.parametrize("mode", [Interpolate(), Reconstruct(), Invert()], ids=lambda m: type(m).__name__.lower())
@pytest.mark.parametrize("sampler", ["ancestral", "euler_ancestral", "euler_maruyama", "dpmpp_sde_2m"])
def test_samplers_that_draw_noise_are_refused_by_name(data, mode, sampler):
    solver = type(SAMPLERS[sampler].solver).__name__
    with pytest.raises(UserError, match=rf"mode={type(mode).__name__.lower()} needs .*, and {solver}"):
        mode(request(data, sampler=sampler))


@dataclass(frozen=True)
class Counted(Denoiser):
    """Writes down how many samples it is asked for at a time."""

    inner: Denoiser
    sizes: list

    def __call__(self, x_t, level, condition):
        self.sizes.append(len(x_t))
        assert condition is None or len(condition) == len(x_t)
        return self.inner(x_t, level, condition)

    def null(self, condition):
        return condition


@pytest.mark.parametrize(
    "mode", [Interpolate(7), Reconstruct((4, 9)), Invert()], ids=lambda m: type(m).__name__.lower()
)
@pytest.mark.parametrize("labels", [True, False])
def test_no_more_samples_at_a_time_than_the_batch_and_the_same_result(data, mode, labels):
    answers = {}
    for batch_size in (3, 100):
        sizes = []
        asked = request(data, n=5, labels=labels, batch_size=batch_size)
        generator = replace(asked.generator, denoiser=Counted(Toy(), sizes))
        answers[batch_size] = mode(asked._replace(generator=generator))
        assert max(sizes) == min(batch_size, 7 if mode == Interpolate(7) else 5)
    few, many = answers[3], answers[100]
    assert (few.images.int() - many.images.int()).abs().max() <= 1
    assert few.columns == many.columns
    for name, array in many.arrays.items():
        assert_close(few.arrays[name], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [Reconstruct((5,)), Invert()], ids=lambda m: type(m).__name__.lower())
def test_a_label_means_images_of_that_class(data, mode):
    pixels, condition = real(request(data, n=4)._replace(label=7))
    assert condition.tolist() == [7] * 4
    assert torch.equal(pixels, data.batch([7, 17, 27, 37])["image"])
    assert torch.equal(mode(request(data, n=4)._replace(label=7)).images[:4], pixels)
    assert len(real(request(data, n=1000)._replace(label=7))[0]) == 10
    with pytest.raises(UserError, match="label=11: the data has no image of it"):
        mode(request(data)._replace(label=11))


def test_a_row_is_under_the_condition_of_its_number_which_the_file_has(data):
    asked = request(data, n=3)
    answer = Interpolate(points=2)(asked)
    assert answer.arrays["label"].tolist() == [0, 1, 2]
    for i in range(3):
        ends = to_unit_of(asked.generator.draw([2 * i, 2 * i + 1], torch.tensor([i, i])))
        assert (answer.images[2 * i : 2 * i + 2].int() - ends).abs().max() <= 1
    assert Interpolate(points=2)(request(data, labels=False)).arrays == {}


def test_steps_that_the_sampler_cannot_take_are_refused_at_once(data):
    with pytest.raises(UserError, match=r"mode\.steps: num_steps=2 is too few for DPMSolverPP3M"):
        Reconstruct((10, 2)).check(SAMPLERS["dpmpp_3m"])
    with pytest.raises(UserError, match="mode=invert needs at least 2 steps"):
        Invert().check(replace(SAMPLERS["ddim"], num_steps=1))


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
