"""The U-Net of Hugging Face's "The Annotated Diffusion Model" (Rogge and Rasul, 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.errors import OrnsteinError
from ornstein.networks.attention import LinearAttention2d, SelfAttention2d
from ornstein.networks.blocks import Downsample, Upsample, shortcut, zero_init
from ornstein.networks.checks import check_divisible, image_size_pair
from ornstein.networks.embeddings import ConditionEmbedding


class WeightStandardizedConv2d(nn.Conv2d):
    """Convolution whose filters have mean 0 and variance 1; works well with group norm.

    Source: Qiao et al. 2019 (arXiv 1903.10520) §3.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the standardised weight."""
        epsilon = 1e-5 if self.weight.dtype == torch.float32 else 1e-3
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * (variance + epsilon).rsqrt()
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class AnnotatedResNetBlock(nn.Module):
    """Post-activation block: twice (standardised conv3x3, norm, SiLU), modulated after the first norm."""

    def __init__(self, in_channels: int, out_channels: int, *, embedding_channels: int, groups: int) -> None:
        """Make a block from `in_channels` to `out_channels`, conditioned on `(B, embedding_channels)`."""
        super().__init__()
        self.condition = nn.Linear(embedding_channels, 2 * out_channels)
        self.conv1 = WeightStandardizedConv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, out_channels)
        self.conv2 = WeightStandardizedConv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform `x (B, C, H, W)` under `embedding (B, E)`, already activated."""
        scale, shift = self.condition(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm1(self.conv1(x)), 1 + scale))
        return self.shortcut(x) + F.silu(self.norm2(self.conv2(h)))


class AnnotatedConvNeXtBlock(nn.Module):
    """Depthwise conv7x7, added condition, norm, conv3x3, GELU, norm, conv3x3, residual."""

    def __init__(
        self, in_channels: int, out_channels: int, *, embedding_channels: int, groups: int, expansion: int = 2
    ) -> None:
        """Make a block; all its norms have one group, `groups` is there for the blocks' common signature."""
        super().__init__()
        del groups
        hidden = expansion * out_channels
        self.condition = nn.Linear(embedding_channels, in_channels)
        self.depthwise = nn.Conv2d(in_channels, in_channels, 7, padding=3, groups=in_channels)
        self.net = nn.Sequential(
            nn.GroupNorm(1, in_channels),
            nn.Conv2d(in_channels, hidden, 3, padding=1),
            nn.GELU(),
            nn.GroupNorm(1, hidden),
            nn.Conv2d(hidden, out_channels, 3, padding=1),
        )
        self.shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform `x (B, C, H, W)` under `embedding (B, E)`, already activated."""
        h = self.depthwise(x) + self.condition(embedding)[:, :, None, None]
        return self.shortcut(x) + self.net(h)


class AnnotatedLevel(nn.Module):
    """Two blocks, attention and resampling; on the way up each block meets a skip connection."""

    def __init__(self, block1: nn.Module, block2: nn.Module, attention: nn.Module, resample: nn.Module) -> None:
        """Join the four parts."""
        super().__init__()
        self.block1 = block1
        self.block2 = block2
        self.attention = attention
        self.resample = resample

    def forward(self, x: Tensor, embedding: Tensor, *skips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output and what the two blocks leave for the way up; `skips` are none or two."""
        h1 = self.block1(torch.cat([x, skips[0]], dim=1) if skips else x, embedding)
        h2 = self.block2(torch.cat([h1, skips[1]], dim=1) if skips else h1, embedding)
        h2 = self.attention(h2)
        return self.resample(h2), h1, h2


class AnnotatedUNet(nn.Module):
    """The tutorial's U-Net: two blocks and linear attention a level, full attention in the middle.

    Both blocks of a level leave a skip connection, the second after the attention; levels change their width
    when they resample (the last one by a 3x3 convolution), and the first feature map meets the last one
    before the output. Beside the tutorial: optional labels, SiLU in the noise perceptron, and output
    projections (attention and network) that start at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        image_size: int | Sequence[int] | None = None,
        base_channels: int = 28,
        channel_mults: Sequence[int] = (1, 2, 4),
        block: str = "resnet",
        groups: int = 4,
        heads: int = 4,
        head_dim: int = 32,
        num_classes: int | None = None,
        noise_embedding: str = "sinusoidal",
        channels_last: bool = True,
    ) -> None:
        """Make the network; arguments as in `UNet`.

        Raises:
            OrnsteinError: an unknown block, groups that do not divide the channels, or an `image_size` that
                does not divide by `2 ** (levels - 1)`.
        """
        super().__init__()
        blocks = {"resnet": AnnotatedResNetBlock, "convnext": AnnotatedConvNeXtBlock}
        if block not in blocks:
            raise OrnsteinError(f"block is one of {', '.join(blocks)}, got '{block}'.")
        if base_channels % groups or base_channels % 2:
            raise OrnsteinError(
                f"base_channels {base_channels} must be even and divide into {groups} groups: choose another "
                "base_channels or groups."
            )
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.num_classes = num_classes
        self.factor = 2 ** (len(channel_mults) - 1)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.image_size = image_size_pair(image_size)
        if self.image_size is not None:
            self._check_size(*self.image_size)
        embedding = 4 * base_channels
        self.embed = ConditionEmbedding(
            embedding, features=base_channels, num_classes=num_classes, noise_embedding=noise_embedding
        )

        def make(channels_in: int, channels_out: int) -> nn.Module:
            return blocks[block](channels_in, channels_out, embedding_channels=embedding, groups=groups)

        def attend(channels: int) -> nn.Module:
            return LinearAttention2d(channels, groups=1, heads=heads, head_dim=head_dim, post_norm=True)

        widths = [base_channels, *(base_channels * mult for mult in channel_mults)]
        pairs = list(pairwise(widths))
        last = len(pairs) - 1
        self.stem = nn.Conv2d(in_channels, base_channels, 1)
        self.down = nn.ModuleList(
            AnnotatedLevel(
                make(narrow, narrow),
                make(narrow, narrow),
                attend(narrow),
                Downsample(narrow, wide, shuffle=True) if i < last else nn.Conv2d(narrow, wide, 3, padding=1),
            )
            for i, (narrow, wide) in enumerate(pairs)
        )
        self.mid1 = make(widths[-1], widths[-1])
        self.mid_attention = SelfAttention2d(widths[-1], groups=1, heads=heads, head_dim=head_dim, bias=False)
        self.mid2 = make(widths[-1], widths[-1])
        self.up = nn.ModuleList(
            AnnotatedLevel(
                make(wide + narrow, wide),
                make(wide + narrow, wide),
                attend(wide),
                Upsample(wide, narrow) if i < last else nn.Conv2d(wide, narrow, 3, padding=1),
            )
            for i, (narrow, wide) in enumerate(reversed(pairs))
        )
        self.out_block = make(2 * base_channels, base_channels)
        self.out = zero_init(nn.Conv2d(base_channels, self.out_channels, 1))

    def _check_size(self, height: int, width: int) -> None:
        check_divisible(height, width, self.factor, why=f"a U-Net of {self.factor} x downsampling")

    def forward(self, x: Tensor, noise_cond: Tensor, *, label: Tensor | None = None) -> Tensor:
        """Return the output `(B, out_channels, H, W)`; arguments and errors as in `UNet.forward`."""
        self._check_size(x.shape[-2], x.shape[-1])
        embedding = F.silu(self.embed(noise_cond, label))
        first = h = self.stem(x.contiguous(memory_format=self.memory_format))
        skips: list[Tensor] = []
        for level in self.down:
            h, *left = level(h, embedding)
            skips += left
        h = self.mid2(self.mid_attention(self.mid1(h, embedding)), embedding)
        for level in self.up:
            h, *_ = level(h, embedding, skips.pop(), skips.pop())
        return self.out(self.out_block(torch.cat([h, first], dim=1), embedding))
