"""EDM2's U-Net, whose activations, weights and updates keep their magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ornstein.errors import OrnsteinError
from ornstein.networks.checks import check_divisible, check_pooled, image_size_pair, join_concat
from ornstein.networks.edm2_blocks import (
    EDM2Block,
    MPConv,
    MPLinear,
    MPNoiseEmbedding,
    mp_cat,
    mp_silu,
    mp_sum,
    normalise_weights,
    unit_magnitude,
)
from ornstein.networks.embeddings import check_labels


class EDM2Embedding(nn.Module):
    """Noise level, label and pooled caption in one activated vector per sample, all of one magnitude.

    A label is the row of a linear map from one-hot vectors of magnitude one; the null class is the zero vector, as in
    EDM2's unconditional calls, so that it has no row of its own and no weights.
    """

    def __init__(
        self,
        dim: int,
        *,
        features: int,
        noise_embedding: str,
        num_classes: int | None,
        pooled_dim: int | None,
        balance: float,
    ) -> None:
        """Make the embedding of `dim` numbers, from `features` of the noise level."""
        super().__init__()
        self.num_classes, self.pooled_dim, self.balance = num_classes, pooled_dim, balance
        self.features = MPNoiseEmbedding(features, kind=noise_embedding)
        self.noise = MPLinear(features, dim)
        self.label = None if num_classes is None else MPLinear(num_classes, dim)
        self.pooled = None if pooled_dim is None else MPLinear(pooled_dim, dim)

    def forward(self, noise_cond: Tensor, label: Tensor | None, pooled: Tensor | None) -> Tensor:
        """Embed `noise_cond (B,)` and what the network takes of `label (B,)` and `pooled (B, P)` as `(B, dim)`."""
        check_labels(label, self.num_classes)
        check_pooled(pooled, self.pooled_dim)
        dtype = self.noise.weight.dtype
        embedding = self.noise(self.features(noise_cond).to(dtype))
        if self.label is not None:
            assert self.num_classes is not None and label is not None
            # No class matches the null label: its row is zero. The root makes the row's magnitude one.
            classes = torch.arange(self.num_classes, device=label.device)
            one_hot = (label[:, None] == classes).to(dtype) * self.num_classes**0.5
            embedding = mp_sum(embedding, self.label(one_hot), self.balance)
        if self.pooled is not None:
            assert pooled is not None
            embedding = mp_sum(embedding, self.pooled(unit_magnitude(pooled.to(dtype), [1])), self.balance)
        return mp_silu(embedding)


class EDM2UNet(nn.Module):
    """The magnitude-preserving U-Net of EDM2 (config G).

    Every weight is kept at unit magnitude: rows are normalised in each forward pass, and in training the parameters
    themselves are put back, in place, at its start, so that a learning rate means the same relative change throughout.
    There are no biases (a channel of ones at the input makes up for them), no group norms and no learned scales but the
    gains of conditions and output, which start at zero: an untrained network returns exactly 0. Evaluation writes to no
    weight.

    The paper's loss also learns an uncertainty per noise level; that belongs to an objective and is not here.

    Source: Karras et al. 2024 (arXiv 2312.02696). Published sizes, by `base_channels`: XS 128, S 192, M 256, L 320,
    XL 384, XXL 448.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        image_size: int | Sequence[int] | None = None,
        base_channels: int = 128,
        channel_mults: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attention: Sequence[bool] = (False, False, True, True),
        head_dim: int = 64,
        dropout: float = 0.0,
        embedding_channels: int | None = None,
        num_classes: int | None = None,
        pooled_dim: int | None = None,
        concat_channels: int = 0,
        noise_embedding: str = "fourier",
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        residual_balance: float = 0.3,
        attention_balance: float = 0.3,
        checkpointing: bool = False,
        channels_last: bool = True,
    ) -> None:
        """Make the network.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output; None: as many as the input.
            image_size: side or `(height, width)`, checked at once; None: any size that divides, checked when called.
            base_channels: channels at multiplier 1.
            channel_mults: one multiplier per level, each at half the resolution of the one before.
            num_blocks: residual blocks per level going down; one more going up.
            attention: one flag per level; the middle always has it.
            head_dim: channels per attention head; fewer channels are one head.
            dropout: between the convolutions of a block, in [0, 1).
            embedding_channels: size of the condition vector; None: channels of the widest level.
            num_classes: classes, or None for an unconditional network; label `num_classes` is the null class.
            pooled_dim: size of a caption's pooled vector, or None for a network without captions.
            concat_channels: channels of a conditioning image joined to the input.
            noise_embedding: `fourier` (conditions of order one, as EDM's) or `sinusoidal` (up to 1000).
            label_balance: share of the label (and of the pooled vector) in the condition, in [0, 1].
            concat_balance: share of the skip connections in the decoder's inputs, in [0, 1].
            residual_balance: share of the convolutions in a block, in [0, 1].
            attention_balance: share of attention in a block, in [0, 1].
            checkpointing: in training keep each block's input only, and compute its inside again on the way back.
            channels_last: run convolutions in the channels-last layout, faster on CPUs and tensor cores.

        Raises:
            OrnsteinError: an unknown option, lists of differing lengths, or sizes that do not divide.
        """
        super().__init__()
        balances = (label_balance, concat_balance, residual_balance, attention_balance)
        _check_options(channel_mults, attention, noise_embedding, balances, num_classes)
        levels = len(channel_mults)
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.num_classes = num_classes
        self.pooled_dim, self.concat_channels = pooled_dim, concat_channels
        self.concat_balance, self.checkpointing = concat_balance, checkpointing
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.factor = 2 ** (levels - 1)
        self.image_size = image_size_pair(image_size)
        if self.image_size is not None:
            self._check_size(*self.image_size)

        widths = [base_channels * mult for mult in channel_mults]
        embedding = max(widths) if embedding_channels is None else embedding_channels
        self.embed = EDM2Embedding(
            embedding,
            features=widths[0],
            noise_embedding=noise_embedding,
            num_classes=num_classes,
            pooled_dim=pooled_dim,
            balance=label_balance,
        )

        block = partial(
            EDM2Block,
            embedding_channels=embedding,
            head_dim=head_dim,
            dropout=dropout,
            residual_balance=residual_balance,
            attention_balance=attention_balance,
        )
        channels = widths[0]
        self.stem = MPConv(in_channels + concat_channels + 1, channels, 3)
        self.encoder = nn.ModuleList()
        skips = [channels]
        for level, width in enumerate(widths):
            if level:
                self.encoder.append(block(channels, channels, encoder=True, resample="down"))
                skips.append(channels)
            for _ in range(num_blocks):
                self.encoder.append(block(channels, width, encoder=True, attention=attention[level]))
                channels = width
                skips.append(channels)
        self.middle = nn.ModuleList(
            [block(channels, channels, encoder=False, attention=True), block(channels, channels, encoder=False)]
        )
        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            if level < levels - 1:
                self.decoder.append(block(channels, channels, encoder=False, resample="up"))
            for _ in range(num_blocks + 1):
                self.decoder.append(block(channels + skips.pop(), width, encoder=False, attention=attention[level]))
                channels = width
        self.out = MPConv(channels, self.out_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self._normalised = [module for module in self.modules() if isinstance(module, MPLinear | MPConv)]

    def _check_size(self, height: int, width: int) -> None:
        check_divisible(height, width, self.factor, why=f"a U-Net of {self.factor} x downsampling")

    def _run(self, block: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, x, embedding, use_reentrant=False)
        return block(x, embedding)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run `forward`, in training on weights that are put back first: outside it, and so outside compiled graphs."""
        if self.training:
            normalise_weights(self._normalised)
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        x: Tensor,
        noise_cond: Tensor,
        *,
        label: Tensor | None = None,
        pooled: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        """Return the network's output for a batch.

        Args:
            x: `(B, in_channels, H, W)`, scaled to about unit variance.
            noise_cond: `(B,)` noise condition.
            label: `(B,)` integers in `[0, num_classes]`; only and always for a class-conditional network.
            pooled: `(B, pooled_dim)`; only and always for a network with captions.
            concat: `(B, concat_channels, H, W)`; only and always for a network with a conditioning image.

        Returns:
            `(B, out_channels, H, W)`.

        Raises:
            OrnsteinError: sides that do not divide, or conditioning that does not fit the network.
        """
        self._check_size(x.shape[-2], x.shape[-1])
        embedding = self.embed(noise_cond, label, pooled)
        x = join_concat(x, concat, self.concat_channels)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        h = self.stem(x.contiguous(memory_format=self.memory_format))
        skips = [h]
        for block in self.encoder:
            h = self._run(block, h, embedding)
            skips.append(h)
        for block in self.middle:
            h = self._run(block, h, embedding)
        for block in self.decoder:
            if block.resample == "keep":
                h = mp_cat(h, skips.pop(), self.concat_balance)
            h = self._run(block, h, embedding)
        return self.out(h, self.out_gain)


def _check_options(
    channel_mults: Sequence[int],
    attention: Sequence[bool],
    noise_embedding: str,
    balances: Sequence[float],
    num_classes: int | None,
) -> None:
    if not channel_mults:
        raise OrnsteinError("channel_mults needs at least one level.")
    if len(attention) != len(channel_mults):
        raise OrnsteinError(
            f"attention has {len(attention)} entries but channel_mults has {len(channel_mults)}: give one per level."
        )
    if noise_embedding not in ("fourier", "sinusoidal"):
        raise OrnsteinError(f"noise_embedding is 'sinusoidal' or 'fourier', got '{noise_embedding}'.")
    if not all(0 <= balance <= 1 for balance in balances):
        raise OrnsteinError(
            "label_balance, concat_balance, residual_balance and attention_balance are shares in [0, 1], got "
            f"{', '.join(f'{balance:g}' for balance in balances)}."
        )
    if num_classes is not None and num_classes < 1:
        raise OrnsteinError(f"num_classes is null (unconditional) or at least 1, got {num_classes}.")
