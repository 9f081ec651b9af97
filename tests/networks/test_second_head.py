"""The U-Net's second head: beside the first output, which it does not touch, and silent at the start."""

import pytest
import torch
from torch.testing import assert_close

from diffusion_trainer.networks.unet import UNet

SETTINGS = {"base_channels": 8, "blocks_per_level": 1, "head_channels": 8, "groups": 2}


def inputs(channels=3):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, channels, 8, 8, generator=generator),
        torch.tensor([-0.5, 1.0]),
        torch.randn(2, 4, generator=generator),
    )


def unet(second_head, channels=3, seed=0):
    torch.manual_seed(seed)
    return UNet(channels, 4, second_head=second_head, **SETTINGS)


def moved(network):
    """With weights that are nowhere zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(network.named_parameters()):
            if not name.startswith("second_head."):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return network


@pytest.mark.parametrize("channels", [1, 3])
def test_it_doubles_the_channels_and_its_half_is_zero_at_the_start(channels):
    out = moved(unet(True, channels))(*inputs(channels))
    assert out.shape == (2, 2 * channels, 8, 8)
    assert (out[:, channels:] == 0).all()
    assert (out[:, :channels] != 0).any()


def test_first_output_is_that_of_the_same_network_without_it():
    with_head, without = moved(unet(True)), moved(unet(False))
    without.load_state_dict({n: p for n, p in with_head.state_dict().items() if not n.startswith("second_head.")})
    with torch.no_grad():
        for p in with_head.second_head.parameters():
            p.add_(0.3)
    out = with_head(*inputs())
    assert torch.equal(out[:, :3], without(*inputs()))
    assert (out[:, 3:] != 0).any()


def test_same_seed_gives_the_same_first_network_with_and_without_it():
    ours, theirs = unet(True).state_dict(), unet(False).state_dict()
    assert set(theirs) == {n for n in ours if not n.startswith("second_head.")}
    for name in theirs:
        assert torch.equal(ours[name], theirs[name])


def test_loss_of_the_second_output_alone_trains_the_head_from_the_start():
    """A convolution of zeros has a gradient; what is behind it has one as soon as it is not zero any more."""
    network = moved(unet(True))
    network(*inputs())[:, 3:].sub(1).square().sum().backward()
    assert network.second_head.conv.weight.grad.any()
    with torch.no_grad():
        network.second_head.conv.weight.add_(0.1)
        network.second_head.block.conv_2.weight.add_(0.1)
    network.zero_grad()
    network(*inputs())[:, 3:].sub(1).square().sum().backward()
    assert all(p.grad.any() for p in network.second_head.parameters())


def test_it_knows_the_noise_level_and_the_condition():
    network = moved(unet(True))
    with torch.no_grad():
        for p in network.second_head.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    x, c_noise, condition = inputs()
    second = network(x, c_noise, condition)[:, 3:]
    assert (network(x, c_noise + 1, condition)[:, 3:] - second).abs().max() > 1e-4
    assert (network(x, c_noise, condition + 1)[:, 3:] - second).abs().max() > 1e-4


def test_dropout_makes_it_no_noisier_where_the_rest_has_none():
    network = moved(unet(True)).train()
    assert_close(network(*inputs()), network(*inputs()), rtol=0, atol=0)
