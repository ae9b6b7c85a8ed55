"""Residual blocks and resampling layers of the U-Nets, all `(B, C, H, W) -> (B, C', H', W')`."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def fit_groups(channels: int, groups: int) -> int:
    """Return the largest number of normalisation groups up to `groups` that divides `channels`."""
    return math.gcd(channels, groups) if channels % groups else groups


def zero_init(module: Layer) -> Layer:
    """Set weight and bias of a layer to zero, in place, and return it."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def shortcut(in_channels: int, out_channels: int) -> nn.Module:
    """Return the identity, or a 1x1 convolution where the channels change."""
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)


class ResNetBlock(nn.Module):
    r"""Pre-activation residual block with noise conditioning.

    `norm, SiLU, conv3x3, condition, norm, SiLU, dropout, conv3x3`, the last convolution zero at the start.
    With `scale_shift` the embedding gives `norm(h) * (1 + scale) + shift` (Nichol & Dhariwal 2021, arXiv
    2102.09672, §3), otherwise it is added before the second norm (Ho et al. 2020, arXiv 2006.11239, app. B).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        groups: int = 32,
        dropout: float = 0.0,
        scale_shift: bool = True,
    ) -> None:
        """Make a block from `in_channels` to `out_channels`, conditioned on `(B, embedding_channels)`."""
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(fit_groups(in_channels, groups), in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.condition = nn.Linear(embedding_channels, (2 if scale_shift else 1) * out_channels)
        self.norm2 = nn.GroupNorm(fit_groups(out_channels, groups), out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform `x (B, C, H, W)` under `embedding (B, E)`, already activated."""
        h = self.conv1(F.silu(self.norm1(x)))
        condition = self.condition(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + condition)
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block with noise conditioning.

    Depthwise convolution, norm over channels, scale and shift (or shift alone) from the embedding, pointwise
    expansion, GELU, pointwise projection that starts at zero, residual. Source: Liu et al. 2022 (arXiv
    2201.03545) §2, conditioned as DiT's blocks are.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        groups: int = 1,
        dropout: float = 0.0,
        scale_shift: bool = True,
        kernel_size: int = 7,
        expansion: int = 2,
    ) -> None:
        """Make a block from `in_channels` to `out_channels`, conditioned on `(B, embedding_channels)`."""
        super().__init__()
        self.scale_shift = scale_shift
        hidden = expansion * out_channels
        self.depthwise = nn.Conv2d(in_channels, in_channels, kernel_size, padding=kernel_size // 2, groups=in_channels)
        self.condition = nn.Linear(embedding_channels, (2 if scale_shift else 1) * in_channels)
        self.norm = nn.GroupNorm(fit_groups(in_channels, groups), in_channels)
        self.expand = nn.Conv2d(in_channels, hidden, 1)
        self.dropout = nn.Dropout(dropout)
        self.project = zero_init(nn.Conv2d(hidden, out_channels, 1))
        self.shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform `x (B, C, H, W)` under `embedding (B, E)`, already activated."""
        h = self.norm(self.depthwise(x))
        condition = self.condition(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        else:
            h = h + condition
        h = F.gelu(self.expand(h), approximate="tanh")
        return self.shortcut(x) + self.project(self.dropout(h))


class Downsample(nn.Module):
    """Halve height and width: a strided 3x3 convolution, or space-to-depth and a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, shuffle: bool = False) -> None:
        """Make the layer; `shuffle` chooses space-to-depth, which is cheaper."""
        super().__init__()
        self.shuffle = shuffle
        self.conv = (
            nn.Conv2d(4 * in_channels, out_channels, 1)
            if shuffle
            else nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H/2, W/2)`."""
        return self.conv(F.pixel_unshuffle(x, 2) if self.shuffle else x)


class Upsample(nn.Module):
    """Double height and width: nearest and a 3x3 convolution, or a 1x1 convolution and depth-to-space."""

    def __init__(self, in_channels: int, out_channels: int, *, shuffle: bool = False) -> None:
        """Make the layer; `shuffle` chooses depth-to-space, which is cheaper."""
        super().__init__()
        self.shuffle = shuffle
        self.conv = (
            nn.Conv2d(in_channels, 4 * out_channels, 1)
            if shuffle
            else nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', 2H, 2W)`."""
        if self.shuffle:
            return F.pixel_shuffle(self.conv(x), 2)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
