"""checkpoint_blocks changes what is kept for the backward pass, and no bit of what is computed."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from diffusion_trainer.networks.unet import UNet

SETTINGS = {
    "channels": 3, "condition_dim": 4, "base_channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 2,
    "attention_levels": (1,), "head_channels": 8, "groups": 4,
}  # fmt: skip


def inputs(count=4, size=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, size, size, generator=generator)
    return x, torch.linspace(-2, 2, count), torch.randn(count, 4, generator=generator)


def unet(checkpoint_blocks, **changes):
    """As after some training: what starts at zero is so no more."""
    torch.manual_seed(0)
    network = UNet(**SETTINGS, checkpoint_blocks=checkpoint_blocks, **changes)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return network


def after_a_step(network, dtype=torch.float32):
    """The output, the gradient at x and at each parameter, and the next random number."""
    x, c_noise, condition = inputs()
    x.requires_grad_(True)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = network(x, c_noise, condition)
    output.float().square().sum().backward()
    return [output, x.grad, *(p.grad for p in network.parameters()), torch.rand(1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"second_head": True}], ids=str)
def test_outputs_gradients_and_random_numbers_are_bitwise_the_same(changes, dtype):
    with_it, without = (after_a_step(unet(kept, **changes), dtype) for kept in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


def kept_bytes(network):
    """Of what the forward pass has saved for the backward pass, each memory once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes = {}

    def pack(saved):
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        output = network(*inputs())
    assert output.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"second_head": True}], ids=str)
def test_less_than_half_is_kept_for_the_backward_pass(changes):
    assert kept_bytes(unet(True, **changes)) < 0.5 * kept_bytes(unet(False, **changes))


def test_each_block_runs_twice_where_gradients_are_taken_and_once_where_not():
    network, calls = unet(True), []
    network.down[0][0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        network(*inputs())
    assert len(calls) == 1
    network(*inputs()).sum().backward()
    assert len(calls) == 3


def test_gradients_at_x_may_be_taken_again_and_differentiated():
    """As the likelihood does with its probes, and guidance inside of guidance."""
    results = []
    for kept in (True, False):
        network, (x, c_noise, condition) = unet(kept).eval().requires_grad_(False), inputs()
        x.requires_grad_(True)
        output = network(x, c_noise, condition)
        (first,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True, create_graph=True)
        (again,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((first, again, second))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
