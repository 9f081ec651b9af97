"""The network's denoiser: what it hands to the network, what it makes of the answer, and how often it computes."""

import re
from dataclasses import dataclass, field

import pytest
import torch
from cases import each
from options import built
from torch.testing import assert_close

from diffusion_trainer.process.denoiser import NetworkDenoiser, split
from diffusion_trainer.process.levels import Level, levels
from diffusion_trainer.process.predictions import Prediction
from diffusion_trainer.process.variances import Estimate

COSINE = built("schedule")["cosine"]
PREDICTIONS = built("prediction")
every_prediction = each("prediction", PREDICTIONS)


@dataclass(frozen=True)
class Counted(Prediction):
    """Another prediction that notes each level at which it is asked."""

    inner: Prediction
    asked: list = field(default_factory=list)

    def coefficients(self, schedule, level):
        self.asked.append(level)
        return self.inner.coefficients(schedule, level)


class Network:
    """Notes what it is given and answers with `output`."""

    def __init__(self, output):
        self.output, self.seen = output, []

    def __call__(self, *arguments):
        self.seen.append(arguments)
        return self.output


def denoiser(network, prediction, null=lambda condition: condition):
    return NetworkDenoiser(network, null, COSINE, prediction)


def images(channels=3, seed=0):
    return torch.randn(4, channels, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_prediction
def test_estimate_is_equation_7_of_karras(prediction):
    x_t, network = images(), Network(images(seed=1))
    for level in levels(COSINE, [0.1, 0.5, 0.9]):
        c = prediction.coefficients(COSINE, Level(*(torch.tensor([v], dtype=torch.float64) for v in level)))
        estimate = denoiser(network, prediction)(x_t, level, None)
        assert_close(estimate.x_0_hat, c.skip * x_t + c.out * network.output, rtol=1e-12, atol=1e-12)
        assert estimate.second is None


@every_prediction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_network_is_given_the_scaled_x_t_its_c_noise_and_the_condition_itself(prediction, dtype):
    x_t, network, condition = images().to(dtype), Network(images()), torch.arange(4)
    (level,) = levels(COSINE, [0.3])
    denoiser(network, prediction)(x_t, level, condition)
    ((x, c_noise, given),) = network.seen
    c = prediction.coefficients(COSINE, COSINE.level(torch.full((4,), 0.3, dtype=torch.float64)))
    assert (x.dtype, c_noise.dtype) == (dtype, dtype)
    assert_close(x.double(), c.into[:, None, None, None] * x_t.double(), rtol=1e-6, atol=1e-6)
    assert_close(c_noise.double(), c.noise, rtol=1e-6, atol=0)
    assert given is condition


@every_prediction
def test_x_t_is_not_changed(prediction):
    x_t = images()
    denoiser(lambda x, *_: x, prediction)(x_t, levels(COSINE, [0.3])[0], None)
    assert torch.equal(x_t, images())


@every_prediction
def test_coefficients_are_computed_once_for_each_level_and_in_float64(prediction):
    counted = Counted(prediction)
    denoise = denoiser(lambda x, *_: x, counted)
    for _ in range(3):  # what a second run of the sampler asks is known
        for level in levels(COSINE, [0.9, 0.5, 0.1]):
            denoise(images().float(), level, None)
    assert [level.t.item() for level in counted.asked] == [0.9, 0.5, 0.1]
    assert {value.dtype for level in counted.asked for value in level} == {torch.float64}


def test_the_c_noise_of_a_level_is_made_once_for_each_size_and_dtype_of_a_batch():
    network = Network(images())
    denoise = denoiser(lambda x, *rest: network(x, *rest)[: len(x)], PREDICTIONS["v"])
    one, other = levels(COSINE, [0.5, 0.2])
    for level, x_t in (
        (one, images()),
        (one, images()),
        (other, images()),
        (one, images()[:2]),
        (one, images().half()),
    ):
        denoise(x_t, level, None)
    first, again, *others = [c_noise for _, c_noise, _ in network.seen]
    assert again is first
    assert [(len(c_noise), c_noise.dtype) for c_noise in (first, *others)] == [
        (4, torch.float64), (4, torch.float64), (2, torch.float64), (4, torch.float16)
    ]  # fmt: skip
    assert others[0][0] != first[0] == others[1][0]


def test_a_network_that_writes_into_its_c_noise_fails_instead_of_spoiling_the_next_run():
    denoise = denoiser(lambda x, c_noise, condition: c_noise.mul_(1000), PREDICTIONS["v"])
    with pytest.raises(RuntimeError, match="single memory location"):
        denoise(images(), levels(COSINE, [0.5])[0], None)


def test_what_inference_mode_has_left_behind_serves_gradients():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    denoise = denoiser(lambda x, c_noise, condition: x + (weight * c_noise)[:, None, None, None], PREDICTIONS["v"])
    (level,) = levels(COSINE, [0.5])
    with torch.inference_mode():
        denoise(images(), level, None)
    denoise(images(), level, None).x_0_hat.sum().backward()
    assert weight.grad != 0


@every_prediction
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)  # of the network
def test_combinations_of_an_estimate_are_those_of_its_x_0_hat(prediction, dtype):
    x_t, other = images(), images(seed=2)
    for level in levels(COSINE, [0.01, 0.5, 0.9]):
        estimate, unread = (denoiser(Network(images(seed=1).to(dtype)), prediction)(x_t, level, None) for _ in range(2))
        x_0_hat = estimate.x_0_hat.clone()
        scale = x_0_hat.abs().max().item()
        for e in (unread, estimate, Estimate(x_0_hat)):
            for a, b in ((0.3, -0.7), (1.0, 0.2), (0.0, 1.0)):
                for x in (x_t, other):
                    assert_close(e.combined(a, x, b), a * x + b * x_0_hat, rtol=0, atol=1e-12 * scale)
                total = images(seed=3)
                assert e.added_to(total, b) is total
                assert_close(total, images(seed=3) + b * x_0_hat, rtol=0, atol=1e-12 * scale)
            for x in (x_t, other):
                expected = (x - level.alpha * x_0_hat) / level.sigma
                assert_close(e.eps_hat(x, level), expected, rtol=0, atol=1e-12 * scale / level.sigma)
        assert torch.equal(unread.x_0_hat, x_0_hat)
        assert torch.equal(x_t, images())


@every_prediction
def test_combinations_are_new_tensors_and_estimates_are_computed_once(prediction):
    x_t, network = images(), Network(images(seed=1))
    for level in levels(COSINE, [0.3, 0.7]):
        c = prediction.coefficients(COSINE, Level(*(torch.tensor([v], dtype=torch.float64) for v in level)))
        estimate = denoiser(network, prediction)(x_t, level, None)
        alone = -(c.skip / c.out).item()  # what leaves nothing but the output
        for of_x_t in (0.3, alone, 0.0):
            estimate.combined(of_x_t, x_t, (1 / c.out).item()).fill_(0)
        assert torch.equal(x_t, images())
        assert torch.equal(network.output, images(seed=1))
        assert estimate.x_0_hat is estimate.x_0_hat


@every_prediction
@pytest.mark.parametrize("read", [False, True])
def test_clipping_leaves_the_estimate_as_it_was(prediction, read):
    network = Network(images(6, seed=1))
    for level in levels(COSINE, [0.3, 0.7]):
        estimate, other = (denoiser(network, prediction)(images(), level, None) for _ in range(2))
        if read:
            assert estimate.x_0_hat.abs().max() > 0.2
        clipped = estimate.clipped(0.2)
        assert torch.equal(clipped.x_0_hat, other.x_0_hat.clamp(-0.2, 0.2))
        assert torch.equal(clipped.second, other.second)
        assert torch.equal(estimate.x_0_hat, other.x_0_hat)
        assert torch.equal(network.output, images(6, seed=1))


def test_eps_hat_of_a_prediction_of_it_is_the_networks_output():
    network = Network(images())
    for t in (0.001, 0.3, 0.999):
        (level,) = levels(COSINE, [t])
        x_t = images(seed=1)
        assert denoiser(network, PREDICTIONS["epsilon"])(x_t, level, None).eps_hat(x_t, level) is network.output


def test_an_estimate_unpacks_into_x_0_hat_and_the_second_output():
    (level,) = levels(COSINE, [0.4])
    estimate = denoiser(Network(images(6)), PREDICTIONS["v"])(images(), level, None)
    x_0_hat, second = estimate
    assert x_0_hat is estimate.x_0_hat
    assert second is estimate.second


def test_two_denoisers_share_no_coefficients():
    (level,) = levels(COSINE, [0.5])
    for name in ("epsilon", "v"):
        counted = Counted(PREDICTIONS[name])
        denoiser(lambda x, *_: x, counted)(images(), level, None)
        assert len(counted.asked) == 1


@every_prediction
def test_second_half_of_the_channels_is_the_second_output_as_it_is(prediction):
    output, x_t = images(6, seed=1), images()
    (level,) = levels(COSINE, [0.4])
    both = denoiser(Network(output), prediction)(x_t, level, None)
    alone = denoiser(Network(output[:, :3]), prediction)(x_t, level, None)
    assert torch.equal(both.x_0_hat, alone.x_0_hat)
    assert torch.equal(both.second, output[:, 3:])


def test_second_output_has_the_dtype_of_x_t():
    (level,) = levels(COSINE, [0.4])
    both = denoiser(Network(images(6).to(torch.bfloat16)), PREDICTIONS["v"])(images().float(), level, None)
    assert both.x_0_hat.dtype == both.second.dtype == torch.float32


def test_split_serves_vectors_too():
    first, second = split(torch.arange(8.0).view(2, 4), torch.zeros(2, 2))
    assert first.tolist() == [[0, 1], [4, 5]]
    assert second.tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 9])
def test_outputs_of_other_widths_are_refused(channels):
    given = images(channels)
    shape = re.escape(str(tuple(given.shape)))
    with pytest.raises(ValueError, match=rf"gave {shape} for x_t .* one with 6 channels"):
        split(given, images())


@pytest.mark.parametrize("dimension", [0, 2, 3])
def test_outputs_that_would_be_broadcast_are_refused(dimension):
    for channels in (3, 6):
        with pytest.raises(ValueError, match="the network gave"):
            split(images(channels).narrow(dimension, 0, 1), images())


def test_null_condition_is_the_networks_own():
    denoise = denoiser(Network(images()), PREDICTIONS["v"], lambda label: torch.full_like(label, 10))
    assert denoise.null(torch.arange(4)).tolist() == [10] * 4
