"""Between the first and the last call of the network no sampler waits for the device or asks the schedule.

The device is "meta" here, whose tensors have no numbers: whoever reads one fails, while the host's own float64 tensors
stay as readable as beside a GPU.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from cases import each
from configured import SAMPLERS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_trainer.process.beta_tables import LinearBeta
from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.predictions import Epsilon
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import FixedSmall
from diffusion_trainer.sampling.adaptive import DormandPrince

FIXED_STEPS = {name: s for name, s in SAMPLERS.items() if not isinstance(s.solver, DormandPrince)}
NUM_STEPS = 9
SHAPE = (2, 3, 4, 4)


class NoCopies(TorchDispatchMode):
    """Fails where numbers go from host to device or back, which waits as well."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if function is torch.ops.aten.copy_.default else args[0]
            assert source.device == out.device, f"a copy from {source.device} to {out.device}"
        return out


class NoTensorsOfNumbers(TorchFunctionMode):
    """Fails where a tensor is made on the device of numbers in Python: a copy that has no operator of its own."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor):
            assert out.device.type == "cpu", f"a copy of numbers to {out.device}"
        return out


@dataclass(frozen=True)
class Counted(Schedule):
    """Counts what it is asked."""

    inner: Schedule = field(default_factory=LinearBeta)
    asked: list = field(default_factory=list, compare=False)

    @property
    def t_range(self):
        return self.inner.t_range

    def alpha(self, t):
        self.asked.append("alpha")
        return self.inner.alpha(t)

    def sigma(self, t):
        self.asked.append("sigma")
        return self.inner.sigma(t)

    def t_of_log_snr(self, log_snr):
        self.asked.append("t_of_log_snr")
        return self.inner.t_of_log_snr(log_snr)


def run(sampler, device, on_step=None):
    """How often the schedule had been asked at each call of the network, and at the end."""
    schedule, asked = Counted(), []

    def network(x, c_noise, condition):
        asked.append(len(schedule.asked))
        return 0.1 * x

    denoiser = NetworkDenoiser(network, lambda condition: condition, schedule, Epsilon())
    x_T = torch.ones(SHAPE, device=device)
    replace(sampler, num_steps=NUM_STEPS)(denoiser, schedule, FixedSmall(), x_T, None, lambda: x_T, on_step)
    return [*asked, len(schedule.asked)]


@each("sampler", FIXED_STEPS)
def test_only_the_look_for_nan_after_the_last_step_reads_from_the_device(sampler):
    done = []
    with NoCopies(), NoTensorsOfNumbers(), pytest.raises(RuntimeError, match="meta tensors"):  # that look
        run(sampler, "meta", lambda i, x, x_0_hat: done.append(i))
    assert done == list(range(NUM_STEPS))


@each("sampler", FIXED_STEPS)
def test_the_schedule_is_asked_before_the_first_call_of_the_network_only(sampler):
    asked = run(sampler, "cpu")
    assert len(asked) > NUM_STEPS
    assert asked[0] == asked[-1] > 0


def test_an_adaptive_method_does_both():
    """So that these tests are known to see it."""
    sampler, done = SAMPLERS["dopri5"], []
    with pytest.raises((RuntimeError, AssertionError), match=r"meta|copy"):
        run(sampler, "meta", lambda i, x, x_0_hat: done.append(i))
    assert not done
    asked = run(sampler, "cpu")
    assert asked[0] < asked[-1]


def test_copies_to_and_from_the_device_are_seen():
    with NoCopies():
        torch.ones(2).double()
        with pytest.raises(AssertionError, match="from cpu to meta"):
            torch.ones(2).to("meta")
        with pytest.raises(AssertionError, match="from cpu to meta"):
            torch.ones(2, device="meta").copy_(torch.ones(2))
    with NoTensorsOfNumbers(), pytest.raises(AssertionError, match="of numbers to meta"):
        torch.tensor([1.0], device="meta")
