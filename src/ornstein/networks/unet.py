"""A U-Net for denoising, from CPU-sized to DDPM's, ADM's and EDM's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.errors import OrnsteinError
from ornstein.networks.attention import Context, CrossAttention2d, LinearAttention2d, SelfAttention2d
from ornstein.networks.blocks import (
    ConvNeXtBlock,
    Downsample,
    ResNetBlock,
    Upsample,
    fit_groups,
    group_norm,
    zero_init,
)
from ornstein.networks.checks import auto_patch_size, check_divisible, check_text, image_size_pair, join_concat
from ornstein.networks.embeddings import ConditionEmbedding, check_labels
from ornstein.networks.unet_init import INITS, initialise
from ornstein.networks.unet_parts import ContextTokens, FilteredDownConv, LabelChannels, Resample, Stage
from ornstein.networks.unet_plan import Step, plan_unet

BLOCKS: dict[str, Callable[..., nn.Module]] = {"resnet": ResNetBlock, "convnext": ConvNeXtBlock}
ATTENTIONS: dict[str, Callable[..., nn.Module]] = {"full": SelfAttention2d, "linear": LinearAttention2d}
RESAMPLINGS = ("conv", "conv_end", "shuffle", "residual", "residual_projected")
LABEL_MODES = ("add", "concat", "cross_attention")


class UNet(nn.Module):
    """Encoder and decoder of residual blocks with a skip connection per block.

    Level `i` works at `1 / (patch_size * 2**i)` of the image's resolution with `base_channels *
    channel_mults[i]` channels. Each level has `num_blocks` blocks going down and one more going up, each
    followed by the level's attention; the middle has two blocks around its own attention. Noise level and
    label are embedded once and condition every block; captions are attended to wherever there is attention.
    Output convolutions of blocks and network start at zero, so that an untrained network returns exactly 0.

    Its options make it the U-Net of DDPM, ADM, DDPM++ and NCSN++, to the same function of the same weights:
    `conf/model/network/ddpm.yaml`, `adm_*.yaml`, `ddpmpp.yaml` and `ncsnpp.yaml` say which.

    Source: Ronneberger et al. 2015 (arXiv 1505.04597), Ho et al. 2020 (arXiv 2006.11239) app. B, Dhariwal & Nichol
    2021 (arXiv 2105.05233) §3, Song et al. 2021 (arXiv 2011.13456) app. H as in Karras et al. 2022 (arXiv
    2206.00364); the space-to-depth stem (`patch_size`) as in Hoogeboom et al. 2023 (arXiv 2301.11093) §3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        image_size: int | Sequence[int] | None = None,
        num_classes: int | None = None,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
        concat_channels: int = 0,
        label_mode: str = "add",
        label_embedding: str = "table",
        label_channels: int = 4,
        label_std: float = 1.0,
        augment_dim: int | None = None,
        patch_size: int | None = 1,
        base_channels: int = 64,
        channel_mults: Sequence[float] = (1, 2, 2),
        stem_channels: int | None = None,
        num_blocks: int | Sequence[int] = 2,
        block: str = "resnet",
        resampling: str = "conv",
        resample_filter: Sequence[float] = (1, 1),
        progressive_input: bool = False,
        attention: str | Sequence[str] = "none",
        mid_attention: str = "full",
        decoder_attention: str = "all",
        heads: int | None = None,
        head_dim: int | None = None,
        groups: int = 32,
        group_channels: int = 1,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = True,
        skip_scale: float = 1.0,
        noise_embedding: str = "sinusoidal",
        embedding_features: int | None = None,
        embedding_channels: int | None = None,
        init: str = "torch",
        channels_last: bool = True,
        checkpointing: bool = False,
    ) -> None:
        """Make the network.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output; None: as many as the input.
            image_size: side or `(height, width)`, checked at once; None: any size that divides, checked when
                called.
            num_classes: classes, or None for an unconditional network; label `num_classes` is the null class.
            text_dim: size of a caption's tokens, which attention levels and the middle attend to; None: no captions.
            pooled_dim: size of a caption's pooled vector, added to the noise embedding; None: none.
            concat_channels: channels of a conditioning image joined to the input.
            label_mode: what a label does: `add` (to the noise embedding), `concat` (constant channels joined to the
                input) or `cross_attention` (a token that attention levels and the middle attend to).
            label_embedding: how it is added: `table`, or `mapped` (see `ConditionEmbedding`).
            label_channels: how many channels `concat` joins.
            label_std: standard deviation of the label embedding at the start; small ones (DiT has 0.02) teach
                labels late in short runs.
            augment_dim: numbers that describe an augmented training image (9 in EDM); None: none.
            patch_size: side of the patches folded into channels before the first convolution; None: the
                smallest power of two that leaves at most 16 pixels on the longer side of `image_size`.
            base_channels: channels at multiplier 1.
            channel_mults: one multiplier per level; its length is the number of levels.
            stem_channels: channels of the first feature map; None: those of the first level.
            num_blocks: residual blocks per level, one number or one per level.
            block: `resnet` or `convnext`.
            resampling: `conv` (strided; nearest and a convolution), `conv_end` (the same, padded as TensorFlow
                does: DDPM), `shuffle` (space-to-depth and 1x1 convolutions, which costs less), `residual` (a residual
                block that resamples: ADM) or `residual_projected` (and a 1x1 convolution in its shortcut: DDPM++).
            resample_filter: low-pass filter of residual resampling and of `progressive_input`; see `Resample`.
            progressive_input: join the input, convolved and halved, to every level (NCSN++).
            attention: `none`, `full` or `linear`, one for all levels or one per level.
            mid_attention: the same for the middle.
            decoder_attention: `all` blocks of a level that has attention, or its `last` one (DDPM++).
            heads: attention heads; with `head_dim` None the channels are split among them.
            head_dim: channels per head.
            groups: groups of the normalisations (fewer where the channels do not divide).
            group_channels: channels that a group has at least.
            norm_eps: epsilon of the normalisations.
            dropout: inside the blocks, in [0, 1).
            scale_shift: condition by scale and shift rather than by an added bias.
            skip_scale: factor on each residual sum; sqrt(1/2) keeps the variance (DDPM++).
            noise_embedding: `sinusoidal` (conditions up to 1000) or `fourier` (of order one), or the papers' own
                forms of these, `ddpm` and `ncsnpp`.
            embedding_features: size of the noise embedding before its perceptron; None: `base_channels`.
            embedding_channels: size of the condition vector; None: `4 * base_channels`.
            init: initial weights: `torch` (its layers' own), `ddpm` or `edm`.
            channels_last: run convolutions in the channels-last layout, faster on CPUs and tensor cores.
            checkpointing: keep less for the backward pass and compute it again there, block by block.

        Raises:
            OrnsteinError: an unknown option, options that exclude each other, lists of differing lengths, or sizes
                that do not divide.
        """
        super().__init__()
        levels = len(channel_mults)
        if levels < 1:
            raise OrnsteinError("channel_mults needs at least one level.")
        blocks = _per_level(num_blocks, levels, "num_blocks")
        attentions = _per_level(attention, levels, "attention")
        _known(block, BLOCKS, "block")
        for kind in (*attentions, mid_attention):
            _known(kind, ("none", *ATTENTIONS), "attention")
        _known(resampling, RESAMPLINGS, "resampling")
        _known(label_mode, LABEL_MODES, "label_mode")
        _known(decoder_attention, ("all", "last"), "decoder_attention")
        _known(init, ("torch", *INITS), "init")
        residual = resampling.startswith("residual")
        if residual and block != "resnet":
            raise OrnsteinError(f"resampling '{resampling}' is a resnet block's: choose block=resnet, not '{block}'.")
        if min(label_channels, 1 + concat_channels) < 1:
            raise OrnsteinError(
                f"label_channels is at least 1 and concat_channels at least 0, got {label_channels} and "
                f"{concat_channels}."
            )
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.num_classes = num_classes
        self.text_dim = text_dim
        self.pooled_dim = pooled_dim
        self.concat_channels = concat_channels
        self.label_mode = "none" if num_classes is None else label_mode
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
            features=base_channels + base_channels % 2 if embedding_features is None else embedding_features,
            num_classes=num_classes if label_mode == "add" else None,
            noise_embedding=noise_embedding,
            label_std=label_std,
            pooled_dim=pooled_dim,
            label_embedding=label_embedding,
            augment_dim=augment_dim,
        )
        inputs = (in_channels + concat_channels) * patch_size**2
        self.label_image: LabelChannels | None = None
        if self.label_mode == "concat" and num_classes is not None:
            self.label_image = LabelChannels(num_classes, label_channels, label_std=label_std)
            inputs += label_channels
        self.context: ContextTokens | None = None
        if text_dim is not None or self.label_mode == "cross_attention":
            classes = num_classes if self.label_mode == "cross_attention" else None
            self.context = ContextTokens(
                text_dim=text_dim, num_classes=classes, channels=embedding, label_std=label_std
            )

        def resample(step: Step) -> nn.Module:
            up, shuffle = step.kind == "up", resampling == "shuffle"
            if residual:
                filtered = Resample(up=up, taps=resample_filter)
                return stage(step, resample=filtered, project=resampling == "residual_projected")
            if up:
                return Upsample(step.in_channels, step.out_channels, shuffle=shuffle)
            return Downsample(step.in_channels, step.out_channels, shuffle=shuffle, pad_end=resampling == "conv_end")

        def stage(step: Step, **options: object) -> Stage:
            width = step.out_channels
            norm: dict[str, Any] = {"eps": norm_eps, "skip_scale": skip_scale}
            made = BLOCKS[block](
                step.in_channels,
                width,
                embedding_channels=embedding,
                groups=groups,
                group_channels=group_channels,
                dropout=dropout,
                scale_shift=scale_shift,
                **norm,
                **options,
            )
            shape = {"groups": fit_groups(width, groups, group_channels), "heads": heads, "head_dim": head_dim, **norm}
            attend = nn.Identity() if step.attention == "none" else ATTENTIONS[step.attention](width, **shape)
            cross = None
            if self.context is not None and step.context:
                cross = CrossAttention2d(width, context_channels=self.context.channels, **shape)
            return Stage(made, attend, cross=cross, checkpointing=checkpointing)

        def build(steps: Sequence[Step]) -> nn.ModuleList:
            return nn.ModuleList(stage(step) if step.kind == "block" else resample(step) for step in steps)

        widths = [round(base_channels * mult) for mult in channel_mults]
        stem = widths[0] if stem_channels is None else stem_channels
        plan = plan_unet(
            widths,
            stem=stem,
            blocks=blocks,
            attentions=attentions,
            mid_attention=mid_attention,
            last_only=decoder_attention == "last",
        )
        self.stem = nn.Conv2d(inputs, stem, 3, padding=1)
        self.encoder = build(plan.encoder)
        self.middle = build(plan.middle)
        self.decoder = build(plan.decoder)
        self.halves = [step.kind == "down" for step in plan.encoder]
        self.joins = [step.joins for step in plan.decoder]
        self.progressive: nn.ModuleList | None = None
        if progressive_input:
            outs = [step.out_channels for step in plan.encoder if step.kind == "down"]
            pairs = zip([inputs, *outs], outs, strict=False)
            self.progressive = nn.ModuleList(FilteredDownConv(i, o, taps=resample_filter) for i, o in pairs)
        self.out_norm = group_norm(plan.channels, groups=groups, group_channels=group_channels, eps=norm_eps)
        self.out = zero_init(nn.Conv2d(plan.channels, self.out_channels * patch_size**2, 3, padding=1))
        if init != "torch":
            initialise(self, init)

    def _check_size(self, height: int, width: int) -> None:
        why = f"a U-Net of patch_size {self.patch_size} and {self.factor // self.patch_size} x downsampling"
        check_divisible(height, width, self.factor, why=why)

    def forward(
        self,
        x: Tensor,
        noise_cond: Tensor,
        *,
        label: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        concat: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Return the network's output for a batch.

        Args:
            x: `(B, in_channels, H, W)`, scaled to about unit variance.
            noise_cond: `(B,)` noise condition.
            label: `(B,)` integers in `[0, num_classes]`; only and always for a class-conditional network.
            text: `(B, L, text_dim)` caption tokens; only and always for a network with captions.
            text_mask: `(B, L)` bool, True where a token is real; None: all are.
            pooled: `(B, pooled_dim)` caption vector; only and always where `pooled_dim` is set.
            concat: `(B, concat_channels, H, W)` conditioning image; only and always where that is not 0.
            augment: `(B, augment_dim)` augmentation parameters; None: the image was not changed.

        Returns:
            `(B, out_channels, H, W)`.

        Raises:
            OrnsteinError: sides that do not divide, or conditioning that does not fit the network.
        """
        self._check_size(x.shape[-2], x.shape[-1])
        embedding, context = self._condition(x.shape[0], noise_cond, label, text, text_mask, pooled, augment)
        x = join_concat(x, concat, self.concat_channels)
        if self.patch_size > 1:
            x = F.pixel_unshuffle(x, self.patch_size)
        if self.label_image is not None and label is not None:
            x = self.label_image(x, label)
        x = x.contiguous(memory_format=self.memory_format)
        h = self.stem(x)
        skips = self._encode(h, x, embedding, context)
        h = skips[-1]
        for module in self.middle:
            h = module(h, embedding, context)
        for module, joins in zip(self.decoder, self.joins, strict=True):
            if joins:
                h = module(h, embedding, context, skip=skips.pop())
            else:
                h = module(h, embedding) if isinstance(module, Stage) else module(h)
        h = self.out(F.silu(self.out_norm(h)))
        return F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h

    def _condition(
        self,
        batch: int,
        noise_cond: Tensor,
        label: Tensor | None,
        text: Tensor | None,
        text_mask: Tensor | None,
        pooled: Tensor | None,
        augment: Tensor | None,
    ) -> tuple[Tensor, Context | None]:
        added = label
        if self.label_mode in ("concat", "cross_attention"):
            check_labels(label, self.num_classes)
            added = None
        embedding = F.silu(self.embed(noise_cond, added, pooled, augment))
        if self.context is None:
            check_text(text, text_mask, None)
            return embedding, None
        return embedding, self.context(batch, label=label, text=text, mask=text_mask)

    def _encode(self, h: Tensor, x: Tensor, embedding: Tensor, context: Context | None) -> list[Tensor]:
        skips = [h]
        level = 0
        for module, halves in zip(self.encoder, self.halves, strict=True):
            h = module(h, embedding, context) if isinstance(module, Stage) else module(h)
            if halves and self.progressive is not None:
                h = x = (h + self.progressive[level](x)) * math.sqrt(0.5)
                level += 1
            skips.append(h)
        return skips


def _per_level(value: int | str | Sequence, levels: int, name: str) -> list:
    if isinstance(value, int | str):
        return [value] * levels
    if len(value) != levels:
        raise OrnsteinError(f"{name} has {len(value)} entries but channel_mults has {levels}: give one per level.")
    return list(value)


def _known(value: str, options: Sequence[str] | dict[str, Callable[..., nn.Module]], name: str) -> None:
    if value not in options:
        raise OrnsteinError(f"{name} is one of {', '.join(options)}, got '{value}'.")
