"""How the network is run, in which memory format and compiled or not, changes nothing that it computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.parts import TrainConfig, check_compile
from diffusion_trainer.conditioning.unconditional import Unconditional
from diffusion_trainer.conventions import UserError
from diffusion_trainer.networks.unet import GroupNorm, UNet
from diffusion_trainer.training.model import Model


def unet(channels=1):
    """As after some training: what starts at zero is so no more."""
    torch.manual_seed(0)
    network = UNet(channels, 0, base_channels=8, blocks_per_level=1, attention_levels=(1,), head_channels=8, groups=4)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return network


class Tiny(nn.Module):
    """Compiled in seconds."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 1), GroupNorm(2, 4)

    def forward(self, x, c_noise, condition):
        return F.silu(self.norm(self.conv(x)) * (1 + c_noise[:, None, None, None])).sum(1, keepdim=True)


def outputs(model, count=4, channels=1):
    """The output of a batch and the gradients of the weights."""
    x = torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    output = model(x, torch.linspace(-2, 2, count), None)
    output.square().mean().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters())]


def test_memory_format_changes_numbers_by_rounding_only_and_no_weight():
    first, last = (Model(unet(3), Unconditional(), channels_last=c) for c in (False, True))
    seen = []
    for model in (first, last):
        model.network.conv_in.register_forward_pre_hook(lambda _, x: seen.append(x[0].stride(1)))
        model.network.down[0][0].conv_1.register_forward_pre_hook(lambda _, x: seen.append(x[0].stride(1)))
    for a, b in zip(outputs(first, channels=3), outputs(last, channels=3), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert seen[1] == 8 * 8  # torch's own format: channels are whole planes apart
    assert seen[3] == 1
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in last.parameters())


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_group_norm_for_gpus_is_group_norm_and_keeps_the_memory_format(mean):
    torch.manual_seed(0)
    norm = GroupNorm(4, 8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    results = []
    for function in (norm.elementwise, nn.GroupNorm.forward.__get__(norm)):
        x = (mean + torch.randn(3, 8, 6, 5, generator=torch.Generator().manual_seed(2))).double()
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(True)
        out = function(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, norm.weight, norm.bias])])
    for a, b in zip(*results, strict=True):  # float32 within, as under autocast
        assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_is_eager_to_rounding_under_the_same_names_whatever_its_weights_become():
    torch.manual_seed(0)
    eager, compiled = (Model(Tiny(), Unconditional(), compiled=c) for c in (False, True))
    compiled.load_state_dict(eager.state_dict(), strict=True)
    names = [name for name, _ in eager.named_parameters()]
    assert names == [name for name, _ in compiled.named_parameters()]
    for count in (4, 6, 3):
        for a, b in zip(outputs(eager, count), outputs(compiled, count), strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-6)
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        p.data.mul_(2)  # as a swap with the EMA does
        q.data.mul_(2)
    assert_close(outputs(eager), outputs(compiled), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_batches_of_every_size_share_a_few_graphs():
    """Training, then samples in batches of other sizes, smaller last ones included, then training again."""
    torch.compiler.reset()
    network, graphs = unet(), []
    network.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)

    def run(count, train):
        x = torch.randn(count, 1, 8, 8).contiguous(memory_format=torch.channels_last)
        c_noise = torch.randn(count) if train else torch.randn(1).expand(count)
        with torch.set_grad_enabled(train):
            network.train(train)(x, c_noise, None)

    for count, train in ((16, True), (32, False), (20, False), (7, False)):
        run(count, train)
    assert len(graphs) <= 3
    for count, train in ((5, False), (16, True), (32, False), (11, False), (24, False), (16, True)):
        known = len(graphs)
        run(count, train)
        assert len(graphs) == known
    torch.compiler.reset()


def config(*overrides):
    return load("train", ["experiment=digits", "trainer.accelerator=cpu", "compile=true", *overrides], TrainConfig)


def test_compiling_needs_a_compiler_and_says_so_before_the_start(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"lacks a compiler \(no-such-compiler; .* use compile=false"):
        check_compile(config())
    check_compile({**config(), "compile": False})


@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload"])
def test_nothing_is_compiled_under_stage_3(strategy):
    with pytest.raises(UserError, match="use strategy=zero2, or compile=false"):
        check_compile(config(f"strategy={strategy}"))
