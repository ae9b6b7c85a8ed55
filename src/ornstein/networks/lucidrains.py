"""The U-Net of lucidrains' denoising-diffusion-pytorch, whose checkpoints it takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.errors import OrnsteinError
from ornstein.networks.annotated import AnnotatedLevel
from ornstein.networks.attention import attend
from ornstein.networks.blocks import Downsample, Upsample, shortcut, zero_init
from ornstein.networks.checks import check_divisible, image_size_pair, join_concat
from ornstein.networks.embeddings import FourierEmbedding, SinusoidalEmbedding, check_labels


class ChannelRMSNorm(nn.Module):
    """Each position's channels brought to a root mean square of 1, times a gain; `(B, C, H, W)` both ways."""

    def __init__(self, channels: int) -> None:
        """Make the norm of `channels`."""
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`."""
        return F.normalize(x, dim=1) * (self.gain * self.gain.shape[0] ** 0.5)[:, None, None]


class RMSResNetBlock(nn.Module):
    """Twice `conv3x3, RMS norm, SiLU`, scaled and shifted after the first norm, residual."""

    def __init__(self, in_channels: int, out_channels: int, *, embedding_channels: int, dropout: float = 0.0) -> None:
        """Make a block from `in_channels` to `out_channels`, conditioned on `(B, embedding_channels)`."""
        super().__init__()
        self.condition = nn.Linear(embedding_channels, 2 * out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = ChannelRMSNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = ChannelRMSNorm(out_channels)
        self.shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform `x (B, C, H, W)` under `embedding (B, E)`, already activated."""
        scale, shift = self.condition(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.dropout(F.silu(torch.addcmul(shift, self.norm1(self.conv1(x)), 1 + scale)))
        return self.shortcut(x) + F.silu(self.norm2(self.conv2(h)))


class MemoryAttention2d(nn.Module):
    """Residual attention, full or linear, to all positions and to a few learned keys and values ("memory").

    Linear attention is that of `ornstein.networks.attention.linear_attention` with the memory among its positions, and
    ends in a norm.
    """

    def __init__(self, channels: int, *, linear: bool, heads: int = 4, head_dim: int = 32, memory: int = 4) -> None:
        """Make the attention with `heads` of `head_dim` and `memory` learned keys and values a head."""
        super().__init__()
        self.heads, self.linear = heads, linear
        self.norm = ChannelRMSNorm(channels)
        self.memory = nn.Parameter(torch.randn(2, heads, memory, head_dim))
        self.qkv = nn.Conv2d(channels, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Conv2d(heads * head_dim, channels, 1)
        self.out_norm: nn.Module = ChannelRMSNorm(channels) if linear else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the positions of `x (B, C, H, W)` and the memory."""
        batch, _, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, -1, height * width).mT
        q, k, v = qkv.unbind(1)  # (B, heads, positions, head_dim)
        remembered = self.memory.to(k.dtype)[:, None].expand(-1, batch, -1, -1, -1)
        k, v = (torch.cat(pair, dim=2) for pair in zip(remembered, (k, v), strict=True))
        y = _linear(q, k, v) if self.linear else attend(q, k, v)
        return x + self.out_norm(self.out(y.mT.reshape(batch, -1, height, width)))


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.softmax(dim=-1) * q.shape[-1] ** -0.5) @ (k.softmax(dim=-2).mT @ v)


class LucidrainsUNet(nn.Module):
    """Two RMS-normalised blocks and attention with memory a level, from a 7x7 stem.

    As `AnnotatedUNet` in its skips and its resampling; other norms, attention, stem and noise embedding. Labels, which
    the original lacks, are added to the noise embedding; the output starts at zero.

    Source: denoising-diffusion-pytorch 2 (`Unet`), after Ho et al. 2020 (arXiv 2006.11239); linear attention as in Shen
    et al. 2021 (arXiv 1812.01243) §3.2, RMS norm of Zhang & Sennrich 2019 (arXiv 1910.07467).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        image_size: int | Sequence[int] | None = None,
        num_classes: int | None = None,
        concat_channels: int = 0,
        base_channels: int = 64,
        stem_channels: int | None = None,
        channel_mults: Sequence[int] = (1, 2, 4, 8),
        attention: Sequence[str] | None = None,
        heads: int = 4,
        head_dim: int = 32,
        memory: int = 4,
        dropout: float = 0.0,
        noise_embedding: str = "sinusoidal",
        num_timesteps: int = 1000,
        label_std: float = 1.0,
        channels_last: bool = True,
    ) -> None:
        """Make the network.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output; None: as many as the input.
            image_size: side or `(height, width)`, checked at once; None: any size that divides.
            num_classes: classes, or None for an unconditional network; label `num_classes` is the null class.
            concat_channels: channels of a conditioning image that joins the input.
            base_channels: channels at multiplier 1; even and at least 4.
            stem_channels: channels after the stem; None: `base_channels`.
            channel_mults: one multiplier per level.
            attention: `linear` or `full` per level; None: full at the last level only.
            heads: attention heads.
            head_dim: channels a head.
            memory: learned keys and values a head.
            dropout: in the blocks' middle, in [0, 1).
            noise_embedding: `sinusoidal` (conditions up to 1000, the original's) or `fourier` (of order one).
            num_timesteps: steps that the sinusoidal embedding counts while the condition rises from 0 to 1000.
            label_std: standard deviation of the label embedding at the start.
            channels_last: run convolutions in the channels-last layout.

        Raises:
            OrnsteinError: an unknown option, or sizes that do not divide.
        """
        super().__init__()
        levels = len(channel_mults)
        kinds = ["linear"] * (levels - 1) + ["full"] if attention is None else list(attention)
        if len(kinds) != levels or not set(kinds) <= {"linear", "full"}:
            raise OrnsteinError(
                f"attention={kinds} needs linear or full for each of channel_mults' {levels} levels, or null."
            )
        if base_channels % 2 or base_channels < 4:
            raise OrnsteinError(f"base_channels={base_channels} must be even and at least 4.")
        if noise_embedding not in ("sinusoidal", "fourier"):
            raise OrnsteinError(f"noise_embedding is 'sinusoidal' or 'fourier', got '{noise_embedding}'.")
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.num_classes, self.concat_channels = num_classes, concat_channels
        self.image_size = image_size_pair(image_size)
        self.factor = 2 ** (levels - 1)
        sinusoidal = noise_embedding == "sinusoidal"
        self.noise_scale = num_timesteps / 1000 if sinusoidal else 1.0
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if self.image_size is not None:
            self._check_size(*self.image_size)

        embedding = 4 * base_channels
        self.noise = nn.Sequential(
            SinusoidalEmbedding(base_channels, sines_first=True, endpoint=True)
            if sinusoidal
            else FourierEmbedding(base_channels),
            nn.Linear(base_channels, embedding),
            nn.GELU(),
            nn.Linear(embedding, embedding),
        )
        self.label: nn.Embedding | None = None
        if num_classes is not None:
            self.label = nn.Embedding(num_classes + 1, embedding)
            nn.init.normal_(self.label.weight, std=label_std)

        def block(channels_in: int, channels_out: int) -> nn.Module:
            return RMSResNetBlock(channels_in, channels_out, embedding_channels=embedding, dropout=dropout)

        def attention_of(channels: int, kind: str) -> nn.Module:
            return MemoryAttention2d(channels, linear=kind == "linear", heads=heads, head_dim=head_dim, memory=memory)

        stem = base_channels if stem_channels is None else stem_channels
        widths = [stem, *(base_channels * mult for mult in channel_mults)]
        pairs = list(pairwise(widths))
        self.stem = nn.Conv2d(in_channels + concat_channels, stem, 7, padding=3)
        self.down = nn.ModuleList(
            AnnotatedLevel(
                block(narrow, narrow),
                block(narrow, narrow),
                attention_of(narrow, kind),
                Downsample(narrow, wide, shuffle=True) if i < levels - 1 else nn.Conv2d(narrow, wide, 3, padding=1),
            )
            for i, ((narrow, wide), kind) in enumerate(zip(pairs, kinds, strict=True))
        )
        self.mid1 = block(widths[-1], widths[-1])
        self.mid_attention = attention_of(widths[-1], "full")
        self.mid2 = block(widths[-1], widths[-1])
        self.up = nn.ModuleList(
            AnnotatedLevel(
                block(wide + narrow, wide),
                block(wide + narrow, wide),
                attention_of(wide, kind),
                Upsample(wide, narrow) if i < levels - 1 else nn.Conv2d(wide, narrow, 3, padding=1),
            )
            for i, ((narrow, wide), kind) in enumerate(zip(reversed(pairs), reversed(kinds), strict=True))
        )
        self.out_block = block(2 * stem, stem)
        self.out = zero_init(nn.Conv2d(stem, self.out_channels, 1))

    def _check_size(self, height: int, width: int) -> None:
        check_divisible(height, width, self.factor, why=f"a U-Net of {self.factor} x downsampling")

    def forward(
        self, x: Tensor, noise_cond: Tensor, *, label: Tensor | None = None, concat: Tensor | None = None
    ) -> Tensor:
        """Return the output `(B, out_channels, H, W)`; arguments and errors as in `UNet.forward`."""
        self._check_size(x.shape[-2], x.shape[-1])
        check_labels(label, self.num_classes)
        x = join_concat(x, concat, self.concat_channels)
        features = self.noise[0](noise_cond * self.noise_scale)
        embedding = self.noise[1:](features.to(self.noise[1].weight.dtype))
        embedding = F.silu(embedding if self.label is None else embedding + self.label(label))
        first = h = self.stem(x.contiguous(memory_format=self.memory_format))
        skips: list[Tensor] = []
        for level in self.down:
            h, *left = level(h, embedding)
            skips += left
        h = self.mid2(self.mid_attention(self.mid1(h, embedding)), embedding)
        for level in self.up:
            h, *_ = level(h, embedding, skips.pop(), skips.pop())
        return self.out(self.out_block(torch.cat([h, first], dim=1), embedding))
