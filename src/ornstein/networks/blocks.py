"""Residual blocks and resampling layers of the U-Nets, all `(B, C, H, W) -> (B, C', H', W')`."""

from __future__ import annotations

import math
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def fit_groups(channels: int, groups: int, group_channels: int = 1) -> int:
    """Return how many normalisation groups `channels` get: `groups`, or as many as divide them.

    No group has fewer than `group_channels` channels, as far as there are that many.
    """
    groups = min(groups, max(1, channels // group_channels))
    return math.gcd(channels, groups) if channels % groups else groups


def group_norm(channels: int, *, groups: int, group_channels: int = 1, eps: float = 1e-5) -> nn.GroupNorm:
    """Return a group norm with `fit_groups` groups."""
    return nn.GroupNorm(fit_groups(channels, groups, group_channels), channels, eps=eps)


def zero_init(module: Layer) -> Layer:
    """Set weight and bias of a layer to zero, in place, and return it."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def shortcut(in_channels: int, out_channels: int, *, project: bool = False) -> nn.Module:
    """Return the identity, or a 1x1 convolution where the channels change or `project` asks for one."""
    if in_channels == out_channels and not project:
        return nn.Identity()
    return nn.Conv2d(in_channels, out_channels, 1)


def residual_sum(x: Tensor, branch: Tensor, *, scale: float) -> Tensor:
    """Return `(x + branch) * scale`; a scale of 1 costs nothing."""
    h = x + branch
    return h if scale == 1.0 else h * scale


class ResNetBlock(nn.Module):
    r"""Pre-activation residual block with noise conditioning.

    `norm, SiLU, conv3x3, condition, norm, SiLU, dropout, conv3x3`, the last convolution zero at the start.
    With `scale_shift` the embedding gives `norm(h) * (1 + scale) + shift` (Nichol & Dhariwal 2021, arXiv
    2102.09672, §3), otherwise it is added before the second norm (Ho et al. 2020, arXiv 2006.11239, app. B).
    With `resample` the block halves or doubles the resolution, in the branch before its first convolution and in
    the shortcut before its projection, as BigGAN's blocks do (Dhariwal & Nichol 2021, arXiv 2105.05233, §3).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        groups: int = 32,
        group_channels: int = 1,
        eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = True,
        skip_scale: float = 1.0,
        resample: nn.Module | None = None,
        project: bool = False,
    ) -> None:
        """Make a block from `in_channels` to `out_channels`, conditioned on `(B, embedding_channels)`.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            embedding_channels: size of the condition vector.
            groups: groups of the norms; `fit_groups` describes this and `group_channels`.
            group_channels: channels that a group has at least.
            eps: of the norms.
            dropout: before the last convolution.
            scale_shift: see above.
            skip_scale: factor on the sum; sqrt(1/2) keeps its variance (Song et al. 2021, arXiv 2011.13456, app. H).
            resample: a layer without parameters that halves or doubles the resolution.
            project: a 1x1 convolution in the shortcut even where the channels stay.
        """
        super().__init__()
        self.scale_shift = scale_shift
        self.skip_scale = skip_scale
        self.resample = resample
        norm = partial(group_norm, groups=groups, group_channels=group_channels, eps=eps)
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.condition = nn.Linear(embedding_channels, (2 if scale_shift else 1) * out_channels)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = shortcut(in_channels, out_channels, project=project)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform `x (B, C, H, W)` under `embedding (B, E)`, already activated."""
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        condition = self.condition(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + condition)
        return residual_sum(self.shortcut(x), self.conv2(self.dropout(F.silu(h))), scale=self.skip_scale)


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
        group_channels: int = 1,
        eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = True,
        skip_scale: float = 1.0,
        kernel_size: int = 7,
        expansion: int = 2,
    ) -> None:
        """Make a block from `in_channels` to `out_channels`, conditioned on `(B, embedding_channels)`."""
        super().__init__()
        self.scale_shift = scale_shift
        self.skip_scale = skip_scale
        hidden = expansion * out_channels
        self.depthwise = nn.Conv2d(in_channels, in_channels, kernel_size, padding=kernel_size // 2, groups=in_channels)
        self.condition = nn.Linear(embedding_channels, (2 if scale_shift else 1) * in_channels)
        self.norm = group_norm(in_channels, groups=groups, group_channels=group_channels, eps=eps)
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
        return residual_sum(self.shortcut(x), self.project(self.dropout(h)), scale=self.skip_scale)


class Downsample(nn.Module):
    """Halve height and width: a strided 3x3 convolution, or space-to-depth and a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, shuffle: bool = False, pad_end: bool = False) -> None:
        """Make the layer; `shuffle` chooses space-to-depth, which is cheaper.

        `pad_end` pads the convolution at the bottom and the right alone, as DDPM's code does (TensorFlow's SAME).
        """
        super().__init__()
        self.shuffle = shuffle
        self.pad_end = pad_end
        self.conv = (
            nn.Conv2d(4 * in_channels, out_channels, 1)
            if shuffle
            else nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=0 if pad_end else 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H/2, W/2)`."""
        if self.pad_end:
            x = F.pad(x, (0, 1, 0, 1))
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
