"""Steps are made of the network's output, without an x_0_hat that nobody looks at: same numbers, fewer operators."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from cases import each
from configured import SAMPLERS, SCHEDULES, by_solver, served
from solving import Noise, unbounded
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_trainer.process.denoiser import Denoiser, NetworkDenoiser
from diffusion_trainer.process.predictions import X0, Epsilon, Flow, PosteriorMean, V
from diffusion_trainer.process.schedules import RectifiedFlow
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.adaptive import DormandPrince

LINEAR = SCHEDULES["linear"]
SOLVERS = by_solver({name: s for name, s in SAMPLERS.items() if not isinstance(s.solver, DormandPrince)})
every_solver = each("sampler", SOLVERS)


class Network:
    """An F that is linear neither in x nor in c_noise; keeps all that it was given and gave, with copies."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, c_noise, condition):
        output = torch.tanh(x.flip(0) + c_noise[:, None]) - 0.3 * x
        self.seen += [(tensor, tensor.clone()) for tensor in (x, c_noise, output)]
        return output


@dataclass(frozen=True)
class Plain(Denoiser):
    """Of the denoiser's estimates nothing but x_0_hat."""

    inner: Denoiser

    def __call__(self, x_t, level, condition):
        return Estimate(self.inner(x_t, level, condition).x_0_hat)

    def null(self, condition):
        return None


def by_network(sampler, schedule, prediction, wrap=lambda denoiser: denoiser, on_step=None):
    """The result and the network."""
    network, noise = Network(), Noise(6)
    denoiser = wrap(NetworkDenoiser(network, lambda condition: condition, schedule, prediction))
    return sampler(denoiser, schedule, FixedSmall(), noise(), None, noise, on_step), network


PREDICTIONS = {"epsilon": Epsilon(), "x_0": X0(), "v": V(), "flow": Flow(), "posterior_mean": PosteriorMean(1000)}
WITHOUT_SIGNAL = {"zero_terminal_snr": SCHEDULES["zero_terminal_snr"], "rectified_flow": RectifiedFlow(t_max=1.0)}
PROCESSES = [
    *((LINEAR, prediction) for prediction in PREDICTIONS.values()),
    *((SCHEDULES["ve"], prediction) for prediction in (Epsilon(), V())),
    *((schedule, prediction) for schedule in WITHOUT_SIGNAL.values() for prediction in (V(), X0(), Flow())),
]


@every_solver
def test_steps_made_of_the_networks_output_are_those_made_of_x_0_hat(sampler):
    sampler = unbounded(sampler, 12)
    for schedule, prediction in PROCESSES:
        if served(sampler, schedule):
            (x, _), (expected, _) = (by_network(sampler, schedule, prediction, wrap) for wrap in (lambda d: d, Plain))
            assert_close(x, expected, rtol=1e-7, atol=1e-7 * expected.abs().max().item())


@every_solver
def test_watching_changes_no_bit_of_the_result(sampler):
    sampler, seen = unbounded(sampler, 8), []
    for prediction in (Epsilon(), V()):
        watched, _ = by_network(sampler, LINEAR, prediction, on_step=lambda i, x, x_0_hat: seen.append(x_0_hat))
        assert torch.equal(watched, by_network(sampler, LINEAR, prediction)[0])


@every_solver
def test_no_step_writes_into_what_the_network_was_given_or_gave(sampler):
    for prediction in PREDICTIONS.values():
        _, network = by_network(unbounded(sampler, 8), LINEAR, prediction)
        assert all(torch.equal(tensor, copy) for tensor, copy in network.seen)


class Operators(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


FLOW = RectifiedFlow(t_max=1.0), Flow()


@pytest.mark.parametrize(
    ("name", "process", "operators"),
    [
        ("ddim", (LINEAR, Epsilon()), [2]),
        ("euler", (SCHEDULES["edm"], Epsilon()), [1]),
        ("ddim", FLOW, [1]),
        ("heun", (LINEAR, V()), [2, 4]),
        ("edm", (LINEAR, V()), [2, 4]),
        ("dpmpp_2s", (LINEAR, Epsilon()), [2, 3]),
        ("dpmpp_2m", (LINEAR, Epsilon()), [4]),
        ("ipndm", (LINEAR, Epsilon()), [5]),
        ("ipndm", (LINEAR, V()), [7]),
    ],
    ids=str,
)
def test_operators_between_calls_of_the_network_are_so_few(name, process, operators):
    """What benchmarks/samplers.py measures on a quiet machine, as a number that does not depend on it."""
    schedule, prediction = process
    counts, sampler, x_T = [], unbounded(SAMPLERS[name], 12), Noise(3)()

    def network(x, c_noise, condition):
        counts.append(counter.count)
        return output

    output, denoiser = Noise(3)(), NetworkDenoiser(network, lambda condition: condition, schedule, prediction)
    for _ in range(2):  # the first run computes what it must know of each level
        counts.clear()
        with Operators() as counter:
            sampler(denoiser, schedule, FixedSmall(), x_T, None, None)
    between = [b - a for a, b in pairwise(counts[6:])]  # from where multistep methods have all their estimates
    assert between == (operators * 12)[6 % len(operators) :][: len(between)]
