"""Between the first and the last call of the network no sampler waits for the device or asks the schedule.

The device is "meta" here, whose tensors have no numbers: whoever reads one fails, while the host's own float64 tensors
stay as readable as beside a GPU.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import pytest
import torch
import yaml
from cases import each
from configured import SAMPLERS
from covering import covering_array
from options import built, names
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_trainer.apps.config import CONF
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.process.analytic import Analytic
from diffusion_trainer.process.beta_tables import LinearBeta
from diffusion_trainer.process.denoiser import NetworkDenoiser
from diffusion_trainer.process.predictions import PosteriorMean
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import FixedSmall
from diffusion_trainer.sampling import gradient_guidance, torchscript
from diffusion_trainer.sampling.adaptive import DormandPrince
from diffusion_trainer.sampling.guidance import AutoGuidance, NoGuidance, WeakModel

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


class Run:
    """One of a sampler, the first of its denoiser. Its prediction asks the schedule for a level's coefficients."""

    def __init__(self, sampler, device, prediction=None, variance=None, guidance=None):
        self.schedule, self.asked, self.at_first_call = Counted(), [], lambda: None
        self.sampler, self.prediction = sampler, prediction or PosteriorMean()
        self.variance, self.guidance = variance or FixedSmall(), guidance or NoGuidance()
        self.x_T, self.label = torch.ones(SHAPE, device=device), torch.ones(2, dtype=torch.int64, device=device)

    def network(self, x, c_noise, condition):
        """With a second output; notes how often the schedule has been asked."""
        if not self.asked:
            self.at_first_call()
        self.asked.append(len(self.schedule.asked))
        return 0.1 * torch.cat([x, x], 1)

    def denoiser(self):
        null = lambda condition: torch.full_like(condition, 10)  # noqa: E731
        return NetworkDenoiser(self.network, null, self.schedule, self.prediction)

    def __call__(self, on_step=None):
        arguments = self.schedule, self.variance, self.x_T, self.label, lambda: self.x_T, on_step
        self.sampler(self.guidance(self.denoiser()), *arguments)


def blind(run):
    """The steps that it has taken when it looks for NaN, which fails on this device, if from the first call of its
    network on it copies nothing and looks at nothing.
    """
    done = []
    with ExitStack() as watched:
        run.at_first_call = lambda: [watched.enter_context(mode()) for mode in (NoCopies, NoTensorsOfNumbers)]
        with pytest.raises(RuntimeError, match="meta tensors"):
            run(lambda i, x, x_0_hat: done.append(i))
    return done


@each("sampler", FIXED_STEPS)
def test_only_the_look_for_nan_after_the_last_step_reads_from_the_device(sampler):
    assert blind(Run(replace(sampler, num_steps=NUM_STEPS), "meta")) == list(range(NUM_STEPS))


@each("sampler", FIXED_STEPS)
def test_the_schedule_is_asked_before_the_first_call_of_the_network_only(sampler):
    run = Run(replace(sampler, num_steps=NUM_STEPS), "cpu")
    run()
    assert len(run.asked) >= NUM_STEPS
    assert run.asked[0] == len(run.schedule.asked) > 0


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    path, log_snr = tmp_path_factory.mktemp("no_sync") / "statistics", torch.linspace(-14, 20, 9, dtype=torch.float64)
    save_file({"log_snr": log_snr, "error": torch.ones(9, *SHAPE[1:]).double()}, path, {"about": json.dumps({})})
    return str(path)


@dataclass(frozen=True)
class Weak(WeakModel):
    """Another network of the same kind, with a schedule of its own."""

    def denoiser(self, device):
        return Run(None, device).denoiser()


def guidances():
    """All of conf/guidance; the files that some read are names of networks in memory, see `in_memory`."""
    for name in names("guidance"):
        node = yaml.safe_load((CONF / "guidance" / f"{name}.yaml").read_text())
        files = {key: key for key, value in node.items() if value == "???"}
        weak = node.pop("weak", None)
        yield name, AutoGuidance(node["scale"], Weak()) if weak else build({**node, **files}, "guidance")


GUIDANCES = dict(guidances())


@pytest.fixture
def in_memory(monkeypatch):
    """Networks on no device: what is read from files is loaded at the first estimate, once for each device."""

    def network(*inputs):
        return inputs[0].flatten(1)[:, :5]

    code = torch.ones(1, 5, device="meta")
    monkeypatch.setattr(torchscript, "_load", lambda file, device: network)
    monkeypatch.setattr(gradient_guidance, "_code_of", lambda *_: code)


def test_neither_does_any_pair_of_prediction_variance_and_guidance(statistics, in_memory):
    sampler = replace(SAMPLERS["ddim_eta_half"], num_steps=3)
    options = {"prediction": built("prediction"), "variance": built("variance"), "guidance": GUIDANCES}
    for row in covering_array({group: list(objects) for group, objects in options.items()}, lambda row: True):
        parts = {group: options[group][name] for group, name in row.items()}
        if isinstance(parts["variance"], Analytic):
            parts["variance"] = replace(parts["variance"], statistics=statistics)
        run = Run(sampler, "meta", **parts)
        assert blind(run) == [0, 1, 2], row
        assert run.asked[0] == len(run.schedule.asked), row


def test_an_adaptive_method_does_both():
    """So that these tests are known to see it."""
    done = []
    with pytest.raises((RuntimeError, AssertionError), match=r"meta|copy"):
        Run(SAMPLERS["dopri5"], "meta")(lambda i, x, x_0_hat: done.append(i))
    assert not done
    run = Run(replace(SAMPLERS["dopri5"], x_0_bound=1.0), "cpu")
    run()
    assert run.asked[0] < len(run.schedule.asked)


def test_copies_to_and_from_the_device_are_seen():
    with NoCopies():
        torch.ones(2).double()
        with pytest.raises(AssertionError, match="from cpu to meta"):
            torch.ones(2).to("meta")
        with pytest.raises(AssertionError, match="from cpu to meta"):
            torch.ones(2, device="meta").copy_(torch.ones(2))
    with NoTensorsOfNumbers(), pytest.raises(AssertionError, match="of numbers to meta"):
        torch.tensor([1.0], device="meta")
