"""The U-Net: a function of x, noise level and condition, sample by sample, of which every parameter matters."""

import pytest
import torch
from options import composed
from torch.testing import assert_close

from diffusion_trainer.networks.unet import Attention, ResidualBlock, UNet

SMALL = {
    "channels": 3, "condition_dim": 4, "base_channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1,
    "attention_levels": (1,), "head_channels": 8, "groups": 4,
}  # fmt: skip


def unet(**changes):
    torch.manual_seed(0)
    return UNet(**(SMALL | changes)).eval()


def trained(**changes):
    """As after some training: what starts at zero is so no more."""
    network = unet(**changes)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return network


def inputs(count=3, height=8, width=8, channels=3):
    """x (count, channels, height, width), c_noise (count,), condition (count, 4)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, channels, height, width, generator=generator)
    return x, torch.linspace(-2, 2, count), torch.randn(count, 4, generator=generator)


@pytest.mark.parametrize("size", [(8, 8), (4, 10), (16, 6)])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_has_the_shape_of_x(size, channels):
    x, c_noise, condition = inputs(2, *size, channels)
    assert unet(channels=channels)(x, c_noise, condition).shape == x.shape


def test_output_starts_at_zero():
    assert not unet()(*inputs()).any()


def test_noise_level_and_condition_and_x_matter():
    network, (x, c_noise, condition) = trained(), inputs()
    output = network(x, c_noise, condition)
    for other in (
        network(x, c_noise + 0.1, condition),
        network(x, c_noise, condition + 0.1),
        network(x + 0.1, c_noise, condition),
    ):
        per_sample = (other - output).flatten(1).abs().max(1).values
        assert (per_sample > 1e-4).all()


def test_samples_of_a_batch_do_not_know_each_other():
    network, (x, c_noise, condition) = trained(), inputs()
    whole = network(x, c_noise, condition)
    alone = [network(x[i : i + 1], c_noise[i : i + 1], condition[i : i + 1]) for i in range(len(x))]
    assert_close(torch.cat(alone), whole, rtol=1e-4, atol=1e-5)


def test_gradient_of_one_sample_reaches_no_other():
    network, (x, c_noise, condition) = trained(), inputs()
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(network(x, c_noise, condition)[0].square().sum(), x)
    assert gradient[0].any()
    assert not gradient[1:].any()


@pytest.mark.parametrize("changes", [{}, {"blocks_per_level": 2, "channel_multipliers": (1, 2, 2)}], ids=str)
def test_gradient_reaches_every_parameter_and_every_entry_of_every_weight(changes):
    network = trained(**changes)
    network(*inputs()).square().sum().backward()
    for name, parameter in network.named_parameters():
        reached = parameter.grad != 0
        assert reached.all() if name.endswith("weight") else reached.any(), name  # attention ignores a bias of its keys


def test_attention_treats_all_places_alike_and_joins_them():
    torch.manual_seed(0)
    attention = Attention(channels=8, head_channels=4, groups=2)
    torch.nn.init.normal_(attention.out.weight)
    attention.norm = torch.nn.Identity()  # a group norm joins all places too, through its mean and variance
    x = torch.randn(2, 8, 4, 4)
    order = torch.randperm(16)
    shuffled = attention(x.flatten(2)[..., order].reshape(x.shape))
    assert_close(shuffled.flatten(2), attention(x).flatten(2)[..., order], rtol=1e-4, atol=1e-5)
    other = x.clone()
    other[:, :, 3, 3] += 1
    assert (attention(other) - attention(x)).abs().amax(1).min() > 1e-5


def test_modulation_of_zero_leaves_a_residual_block_as_it_is():
    torch.manual_seed(0)
    block = ResidualBlock(into=8, out=8, dim=4, groups=4, dropout=0.0)
    torch.nn.init.zeros_(block.modulation.bias)
    x = torch.randn(2, 8, 4, 4)
    silu = torch.nn.functional.silu
    expected = x + block.conv_2(silu(block.norm_2(block.conv_1(silu(block.norm_1(x))))))
    assert_close(block(x, torch.zeros(2, 4)), expected)


def test_heads_of_attention_do_not_mix_before_the_last_projection():
    torch.manual_seed(0)
    attention = Attention(channels=8, head_channels=4, groups=2)
    with torch.no_grad():
        attention.out.weight.copy_(torch.eye(8)[:, :, None, None])
        attention.qkv.weight.copy_(torch.eye(8).repeat(3, 1)[:, :, None, None])
    attention.norm = torch.nn.Identity()
    x, other = torch.randn(2, 1, 8, 4, 4)
    other[:, :4] = x[:, :4]
    assert torch.equal(attention(other)[:, :4], attention(x)[:, :4])


def test_without_a_condition_there_is_nothing_to_embed():
    network, (x, c_noise, _) = trained(condition_dim=0), inputs()
    assert network.condition is None
    assert network(x, c_noise, None).shape == x.shape


def test_dropout_acts_in_training_only():
    network, arguments = trained(dropout=0.5), inputs()
    assert torch.equal(network(*arguments), network(*arguments))
    network.train()
    assert not torch.equal(network(*arguments), network(*arguments))


def test_network_of_the_digits_is_under_600_thousand_parameters():
    network = composed("network", "experiment=digits")
    count = sum(p.numel() for p in network.parameters())
    assert 100_000 < count < 600_000
    assert network(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, 64)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"groups": 3}, "groups=3"),
        ({"base_channels": 10}, "groups=4"),
        ({"attention_levels": (2,)}, "attention_levels: 2"),
        ({"attention_levels": (-1,)}, "attention_levels: -1"),
        ({"head_channels": 5}, "head_channels=5"),
        ({"dropout": 1.5}, "dropout"),
    ],
    ids=str,
)
def test_arguments_that_fit_no_network_are_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        unet(**wrong)


@pytest.mark.parametrize("size", [(12, 12), (4, 8), (8, 20)])
def test_sizes_that_halve_as_often_as_there_are_levels_pass(size):
    network = unet(channel_multipliers=(1, 2, 2))
    network.check_size(*size)
    assert network(*inputs(1, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("size", [(9, 8), (8, 9), (6, 8), (8, 6)])
def test_sizes_that_do_not_halve_are_refused(size):
    network = unet(channel_multipliers=(1, 2, 2))
    with pytest.raises(ValueError, match="halve 2 times"):
        network.check_size(*size)
    with pytest.raises(ValueError, match="halve 2 times"):
        network(*inputs(1, *size))
