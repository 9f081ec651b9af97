"""A U-Net of residual blocks that are modulated by the noise level and the condition."""

from collections.abc import Iterable, Sequence
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class NoiseEmbedding(nn.Module):
    """(B,) -> (B, dim): sines and cosines of c_noise at geometric frequencies, then a small MLP (Ho et al. 2020, B)."""

    def __init__(self, features: int, dim: int, max_frequency: float = 64.0):
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, log(max_frequency), features // 2)) / 4
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise[:, None].float() * self.frequencies  # (B, features / 2)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


class GroupNorm(nn.GroupNorm):
    """(B, C, H, W) -> the same, in the memory format of x on every device."""

    def forward(self, x: Tensor) -> Tensor:
        # On a GPU torch's kernel reads and writes contiguous memory only: all convolutions after it would run in it.
        if x.is_cuda and x.is_contiguous(memory_format=torch.channels_last):
            return self.elementwise(x)
        return super().forward(x)

    def elementwise(self, x: Tensor) -> Tensor:
        """The same in operations that keep any memory format, in float32 as autocast has torch's own."""
        grouped = x.float().unflatten(1, (self.num_groups, -1))  # (B, groups, C / groups, H, W)
        variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0, keepdim=True)
        weight, bias = (p.view(1, self.num_groups, -1, 1, 1) for p in (self.weight, self.bias))
        scale = weight * (variance + self.eps).rsqrt()  # (B, groups, C / groups, 1, 1)
        return torch.addcmul(bias - mean * scale, grouped, scale).flatten(1, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the embedding scales and shifts the second norm (Dhariwal and Nichol 2021, section 3)."""

    def __init__(self, into: int, out: int, dim: int, groups: int, dropout: float):
        super().__init__()
        self.norm_1, self.conv_1 = GroupNorm(groups, into), nn.Conv2d(into, out, 3, padding=1)
        self.modulation = nn.Linear(dim, 2 * out)
        self.norm_2, self.dropout = GroupNorm(groups, out), nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))  # (B, out, H, W)
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)  # (B, out, 1, 1) each
        h = F.silu(self.norm_2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv_2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over the H*W places, residual."""

    def __init__(self, channels: int, head_channels: int, groups: int):
        super().__init__()
        self.heads = channels // head_channels
        self.norm = GroupNorm(groups, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(3, 4)
        q, k, v = qkv.unbind(1)  # (B, heads, H * W, head_channels) each
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, C, H, W)
        return x + self.out(h)


class SecondHead(nn.Module):
    """The last features (B, into, H, W) -> (B, channels, H, W): a second output (Bao et al. 2022b, section 4)."""

    def __init__(self, into: int, channels: int, dim: int, groups: int):
        super().__init__()
        self.block = ResidualBlock(into, into, dim, groups, dropout=0.0)
        self.norm, self.conv = GroupNorm(groups, into), nn.Conv2d(into, channels, 3, padding=1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(self.block(h, embedding))))


class UNet(nn.Module):
    """F(x, c_noise, embedding of the condition) -> (B, channels, H, W), the shape of x.

    With a second head, (B, 2 * channels, H, W): F, and a second output for objectives that need one.

    channel_multipliers: one per resolution, each half of the one before, so H and W must divide by 2^(levels - 1).
    attention_levels: numbers of the resolutions (0 is the full one) whose blocks are followed by self-attention.
    checkpoint_blocks: where gradients are taken, keep of each block (with its attention) only what goes into it, and
    compute it again in the backward pass (Chen et al. 2016): the same numbers to the last bit, a third more work.
    """

    def __init__(
        self,
        channels: int,
        condition_dim: int,
        base_channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 2),
        blocks_per_level: int = 2,
        attention_levels: Sequence[int] = (),
        head_channels: int = 32,
        groups: int = 8,
        dropout: float = 0.0,
        second_head: bool = False,
        checkpoint_blocks: bool = False,
    ):
        super().__init__()
        self.checkpoint_blocks, self.random_blocks = checkpoint_blocks, dropout > 0
        _check(channels, base_channels, channel_multipliers, blocks_per_level, attention_levels, head_channels, groups)
        widths = [base_channels * m for m in channel_multipliers]
        dim = 4 * base_channels
        self.downs = len(widths) - 1
        self.noise = NoiseEmbedding(base_channels, dim)
        self.condition = nn.Linear(condition_dim, dim, bias=False) if condition_dim else None
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)

        def block(into: int, out: int) -> ResidualBlock:
            return ResidualBlock(into, out, dim, groups, dropout)

        def attention(level: int) -> nn.Module:
            return Attention(widths[level], head_channels, groups) if level in attention_levels else nn.Identity()

        self.down, self.up, skips, width = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
        for level, out in enumerate(widths):
            for _ in range(blocks_per_level):
                self.down.append(nn.ModuleList([block(width, out), attention(level)]))
                width = out
                skips.append(width)
            if level < self.downs:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList([block(width, width), attention(self.downs), block(width, width)])
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(blocks_per_level + 1):
                self.up.append(nn.ModuleList([block(width + skips.pop(), out), attention(level)]))
                width = out
            if level:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm_out, self.conv_out = GroupNorm(groups, width), nn.Conv2d(width, channels, 3, padding=1)
        self.second_head = SecondHead(width, channels, dim, groups) if second_head else None
        self.initialize_weights()

    def initialize_weights(self) -> None:
        # Residual branches and the output start at zero: the first gradients are those of a shallow linear network.
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv_2.weight)
                nn.init.zeros_(module.conv_2.bias)
            if isinstance(module, Attention):
                nn.init.zeros_(module.out.weight)
                nn.init.zeros_(module.out.bias)
        for out in [self.conv_out] + ([self.second_head.conv] if self.second_head else []):
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)

    def check_size(self, height: int, width: int) -> None:
        """ValueError if images of this size cannot be halved as often as the levels ask."""
        if height % 2**self.downs or width % 2**self.downs:
            raise ValueError(f"images of {height}x{width} do not halve {self.downs} times (channel_multipliers)")

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None) -> Tensor:
        self.check_size(*x.shape[2:])
        embedding = self.noise(c_noise)  # (B, dim)
        if self.condition is not None:
            embedding = embedding + self.condition(condition)
        embedding = F.silu(embedding)
        h = self.conv_in(x)  # (B, C_0, H, W)
        skips = [h]
        for layer in self.down:
            # (B, C_l, H / 2^l, W / 2^l)
            h = self._blocks(layer, embedding, h) if isinstance(layer, nn.ModuleList) else layer(h)
            skips.append(h)
        h = self._blocks(self.middle, embedding, h)
        for layer in self.up:
            if isinstance(layer, nn.ModuleList):
                h = self._blocks(layer, embedding, h, skips.pop())
            else:
                h = layer(F.interpolate(h, scale_factor=2, mode="nearest"))
        out = self.conv_out(F.silu(self.norm_out(h)))  # (B, channels, H, W)
        if self.second_head is None:
            return out
        return torch.cat([out, self._blocks([self.second_head], embedding, h)], dim=1)

    def _blocks(self, layers: Iterable[nn.Module], embedding: Tensor, *h: Tensor) -> Tensor:
        """The layers one after the other, on h with its skip connection if there is one."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            # Only dropout draws: without it the generator's state need not be kept for the second time.
            random = self.random_blocks and self.training
            return checkpoint(_apply, layers, embedding, *h, use_reentrant=False, preserve_rng_state=random)
        return _apply(layers, embedding, *h)


def _apply(layers: Iterable[nn.Module], embedding: Tensor, *h: Tensor) -> Tensor:
    x = torch.cat(h, dim=1) if len(h) > 1 else h[0]
    for layer in layers:
        x = layer(x, embedding) if isinstance(layer, ResidualBlock | SecondHead) else layer(x)
    return x


def _check(
    channels: int,
    base_channels: int,
    channel_multipliers: Sequence[int],
    blocks_per_level: int,
    attention_levels: Sequence[int],
    head_channels: int,
    groups: int,
) -> None:
    if min(channels, base_channels, blocks_per_level, head_channels, groups, len(channel_multipliers)) < 1:
        raise ValueError("channels, base_channels, blocks_per_level, head_channels and groups must be positive, "
                         "channel_multipliers not empty")  # fmt: skip
    if base_channels % 2:
        raise ValueError(f"base_channels must be even (sines and cosines of the noise level), not {base_channels}")
    widths = [base_channels * m for m in channel_multipliers]
    if any(w % groups for w in widths):
        raise ValueError(f"every level's channels {widths} must divide by groups={groups}")
    for level in attention_levels:
        if not 0 <= level < len(widths) or widths[level] % head_channels:
            raise ValueError(
                f"attention_levels: {level} must be one of the {len(widths)} levels, channels "
                f"{widths}, and its channels divide by head_channels={head_channels}"
            )
