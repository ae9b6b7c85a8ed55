"""Encoder and decoder that the KL and the VQ autoencoder share."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every GroupNorm, as in the published autoencoders


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # A block that starts as the identity keeps the deep stack trainable from the first step.
        nn.init.zeros_(self.conv2.weight)
        self.skip: nn.Module = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SelfAttention(nn.Module):
    """Single-head self-attention over positions, residual, (B, C, H, W) -> the same."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        # The head's axis is spelled out: without it the kernels that need little memory are not taken.
        q, k, v = (layer(h)[:, None] for layer in (self.q, self.k, self.v))
        h = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).reshape(x.shape)


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution, with or without self-attention between them."""

    def __init__(self, channels: int, *, groups: int, attention: bool) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels, groups=groups)
        self.attention = SelfAttention(channels, groups=groups) if attention else nn.Identity()
        self.block2 = ResidualBlock(channels, channels, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.block2(self.attention(self.block1(x)))


class Down(nn.Module):
    """Half the side by a strided convolution, padded at the right and the bottom alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Twice the side: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then the way to the next, if there is one."""

    def __init__(
        self, in_channels: int, out_channels: int, *, blocks: int, groups: int, resample: type[Down | Up] | None
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * blocks]
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, groups=groups) for a, b in pairwise(widths)))
        self.resample = nn.Identity() if resample is None else resample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        return self.resample(self.blocks(x))


class Encoder(nn.Module):
    """Images to features at the lowest resolution, each level but the last halving the side.

    Source: Esser et al. 2021 (arXiv 2012.09841), table 7, without the attention inside levels.

    Args:
        in_channels: of the images.
        widths: channels at each resolution, from the highest.
        out_channels: of what comes out.
        blocks: residual blocks a resolution.
        groups: of every GroupNorm.
        attention: self-attention at the lowest resolution.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], out_channels: int, *, blocks: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.levels = nn.Sequential()
        for i, width in enumerate(widths):
            before, resample = widths[max(i - 1, 0)], Down if i + 1 < len(widths) else None
            self.levels.append(Level(before, width, blocks=blocks, groups=groups, resample=resample))
        self.middle = Middle(widths[-1], groups=groups, attention=attention)
        self.norm = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H / 2^n, W / 2^n)."""
        return self.out(F.silu(self.norm(self.middle(self.levels(self.stem(x))))))


class Decoder(nn.Module):
    """The way back; one residual block more a resolution than the encoder, as in the published ones.

    Args as for :class:`Encoder`; ``widths`` from the highest resolution too.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], out_channels: int, *, blocks: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        widths = list(reversed(widths))
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], groups=groups, attention=attention)
        self.levels = nn.Sequential()
        for i, width in enumerate(widths):
            before, resample = widths[max(i - 1, 0)], Up if i + 1 < len(widths) else None
            self.levels.append(Level(before, width, blocks=blocks + 1, groups=groups, resample=resample))
        self.norm = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, out_channels, h 2^n, w 2^n)."""
        return self.out(F.silu(self.norm(self.levels(self.middle(self.stem(h))))))
