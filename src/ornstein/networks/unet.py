"""A U-Net for denoising, from CPU-sized to DDPM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.errors import OrnsteinError
from ornstein.networks.attention import LinearAttention2d, SelfAttention2d
from ornstein.networks.blocks import ConvNeXtBlock, Downsample, ResNetBlock, Upsample, fit_groups, zero_init
from ornstein.networks.checks import auto_patch_size, check_divisible, image_size_pair
from ornstein.networks.embeddings import ConditionEmbedding

BLOCKS: dict[str, Callable[..., nn.Module]] = {"resnet": ResNetBlock, "convnext": ConvNeXtBlock}
ATTENTIONS: dict[str, Callable[..., nn.Module]] = {"full": SelfAttention2d, "linear": LinearAttention2d}


class Stage(nn.Module):
    """A residual block and the attention after it (or the identity)."""

    def __init__(self, block: nn.Module, attention: nn.Module) -> None:
        """Join `block(x, embedding)` and `attention(x)`."""
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Transform `x (B, C, H, W)` under `embedding (B, E)`, already activated."""
        return self.attention(self.block(x, embedding))


class UNet(nn.Module):
    """Encoder and decoder of residual blocks with a skip connection per block.

    Level `i` works at `1 / (patch_size * 2**i)` of the image's resolution with `base_channels *
    channel_mults[i]` channels. Each level has `num_blocks` blocks going down and one more going up, each
    followed by the level's attention; the middle has two blocks around its own attention. Noise level and
    label are embedded once and condition every block. Output convolutions of blocks and network start at
    zero, so that an untrained network returns exactly 0.

    Source: Ronneberger et al. 2015 (arXiv 1505.04597), Ho et al. 2020 (arXiv 2006.11239) app. B; the
    space-to-depth stem (`patch_size`) as in Hoogeboom et al. 2023 (arXiv 2301.11093) §3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        image_size: int | Sequence[int] | None = None,
        base_channels: int = 64,
        channel_mults: Sequence[int] = (1, 2, 2),
        num_blocks: int | Sequence[int] = 2,
        block: str = "resnet",
        attention: str | Sequence[str] = "none",
        mid_attention: str = "full",
        heads: int | None = None,
        head_dim: int | None = None,
        groups: int = 32,
        dropout: float = 0.0,
        scale_shift: bool = True,
        shuffle_resampling: bool = False,
        patch_size: int | None = 1,
        embedding_channels: int | None = None,
        num_classes: int | None = None,
        noise_embedding: str = "sinusoidal",
        label_std: float = 1.0,
        channels_last: bool = True,
    ) -> None:
        """Make the network.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output; None: as many as the input.
            image_size: side or `(height, width)`, checked at once; None: any size that divides, checked when
                called.
            base_channels: channels at multiplier 1.
            channel_mults: one multiplier per level; its length is the number of levels.
            num_blocks: residual blocks per level, one number or one per level.
            block: `resnet` or `convnext`.
            attention: `none`, `full` or `linear`, one for all levels or one per level.
            mid_attention: the same for the middle.
            heads: attention heads; with `head_dim` None the channels are split among them.
            head_dim: channels per head.
            groups: groups of the normalisations (fewer where the channels do not divide).
            dropout: inside the blocks, in [0, 1).
            scale_shift: condition by scale and shift rather than by an added bias.
            shuffle_resampling: resample by space-to-depth and 1x1 convolutions, which costs less.
            patch_size: side of the patches folded into channels before the first convolution; None: the
                smallest power of two that leaves at most 16 pixels on the longer side of `image_size`.
            embedding_channels: size of the condition vector; None: `4 * base_channels`.
            num_classes: classes, or None for an unconditional network; label `num_classes` is the null class.
            noise_embedding: `sinusoidal` (conditions up to 1000) or `fourier` (of order one).
            label_std: standard deviation of the label embedding at the start; small ones (DiT has 0.02) teach
                labels late in short runs.
            channels_last: run convolutions in the channels-last layout, faster on CPUs and tensor cores.

        Raises:
            OrnsteinError: an unknown option, lists of differing lengths, or sizes that do not divide.
        """
        super().__init__()
        levels = len(channel_mults)
        if levels < 1:
            raise OrnsteinError("channel_mults needs at least one level.")
        blocks = _per_level(num_blocks, levels, "num_blocks")
        attentions = _per_level(attention, levels, "attention")
        _known(block, BLOCKS, "block")
        for kind in (*attentions, mid_attention):
            _known(kind, {"none": None, **ATTENTIONS}, "attention")
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.num_classes = num_classes
        self.image_size = image_size_pair(image_size)
        if patch_size is None:
            patch_size = auto_patch_size(self.image_size, grid=16)
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (levels - 1)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if self.image_size is not None:
            self._check_size(*self.image_size)

        embedding = 4 * base_channels if embedding_channels is None else embedding_channels
        self.embed = ConditionEmbedding(
            embedding,
            features=base_channels + base_channels % 2,
            num_classes=num_classes,
            noise_embedding=noise_embedding,
            label_std=label_std,
        )

        def stage(channels_in: int, channels_out: int, kind: str) -> Stage:
            make = BLOCKS[block]
            residual = make(
                channels_in,
                channels_out,
                embedding_channels=embedding,
                groups=groups,
                dropout=dropout,
                scale_shift=scale_shift,
            )
            if kind == "none":
                return Stage(residual, nn.Identity())
            attend = ATTENTIONS[kind]
            norm_groups = fit_groups(channels_out, groups)
            return Stage(residual, attend(channels_out, groups=norm_groups, heads=heads, head_dim=head_dim))

        widths = [base_channels * mult for mult in channel_mults]
        channels = widths[0]
        self.stem = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)
        self.encoder = nn.ModuleList()
        skips = [channels]
        for i, width in enumerate(widths):
            if i:
                self.encoder.append(Downsample(channels, channels, shuffle=shuffle_resampling))
                skips.append(channels)
            for _ in range(blocks[i]):
                self.encoder.append(stage(channels, width, attentions[i]))
                channels = width
                skips.append(channels)
        self.middle = nn.ModuleList([stage(channels, channels, mid_attention), stage(channels, channels, "none")])
        self.decoder = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(blocks[i] + 1):
                self.decoder.append(stage(channels + skips.pop(), width, attentions[i]))
                channels = width
            if i:
                self.decoder.append(Upsample(channels, channels, shuffle=shuffle_resampling))
        self.out_norm = nn.GroupNorm(fit_groups(channels, groups), channels)
        self.out = zero_init(nn.Conv2d(channels, self.out_channels * patch_size**2, 3, padding=1))

    def _check_size(self, height: int, width: int) -> None:
        why = f"a U-Net of patch_size {self.patch_size} and {self.factor // self.patch_size} x downsampling"
        check_divisible(height, width, self.factor, why=why)

    def forward(self, x: Tensor, noise_cond: Tensor, *, label: Tensor | None = None) -> Tensor:
        """Return the network's output for a batch.

        Args:
            x: `(B, in_channels, H, W)`, scaled to about unit variance.
            noise_cond: `(B,)` noise condition.
            label: `(B,)` integers in `[0, num_classes]`; only and always for a class-conditional network.

        Returns:
            `(B, out_channels, H, W)`.

        Raises:
            OrnsteinError: sides that do not divide, or labels that do not fit the network.
        """
        self._check_size(x.shape[-2], x.shape[-1])
        embedding = F.silu(self.embed(noise_cond, label))
        if self.patch_size > 1:
            x = F.pixel_unshuffle(x, self.patch_size)
        h = self.stem(x.contiguous(memory_format=self.memory_format))
        skips = [h]
        for module in self.encoder:
            h = module(h, embedding) if isinstance(module, Stage) else module(h)
            skips.append(h)
        for module in self.middle:
            h = module(h, embedding)
        for module in self.decoder:
            joined = isinstance(module, Stage)
            h = module(torch.cat([h, skips.pop()], dim=1), embedding) if joined else module(h)
        h = self.out(F.silu(self.out_norm(h)))
        return F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h


def _per_level(value: int | str | Sequence, levels: int, name: str) -> list:
    if isinstance(value, int | str):
        return [value] * levels
    if len(value) != levels:
        raise OrnsteinError(f"{name} has {len(value)} entries but channel_mults has {levels}: give one per level.")
    return list(value)


def _known(value: str, options: dict, name: str) -> None:
    if value not in options:
        raise OrnsteinError(f"{name} is one of {', '.join(options)}, got '{value}'.")
