"""The U-Net as a plain list of steps, before any of it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One entry of encoder, middle or decoder.

    Attributes:
        kind: `block`, `down` (half the resolution) or `up`.
        in_channels: what it takes, a joined skip connection included.
        out_channels: what it gives.
        attention: `none`, `full` or `linear`.
        context: whether it attends to context tokens, where there are any.
        joins: whether a skip connection is joined to its input.
    """

    kind: str
    in_channels: int
    out_channels: int
    attention: str = "none"
    context: bool = False
    joins: bool = False


@dataclass(frozen=True)
class Plan:
    """Steps in the order in which they run; `channels` is what the last one gives."""

    encoder: tuple[Step, ...]
    middle: tuple[Step, ...]
    decoder: tuple[Step, ...]
    channels: int


def plan_unet(
    widths: Sequence[int],
    *,
    stem: int,
    blocks: Sequence[int],
    attentions: Sequence[str],
    mid_attention: str,
    last_only: bool = False,
) -> Plan:
    """Lay out a U-Net of one level per entry of `widths`.

    Args:
        widths: channels of each level, the highest resolution first.
        stem: channels of the first feature map.
        blocks: residual blocks of each level going down; going up there is one more.
        attentions: kind of attention of each level.
        mid_attention: the same for the middle.
        last_only: going up, attention only after a level's last block.

    Returns:
        The steps. Every feature map of the way down, the stem's and the halved ones too, is joined going up.
    """
    encoder: list[Step] = []
    channels, skips = stem, [stem]
    for i, width in enumerate(widths):
        if i:
            encoder.append(Step("down", channels, channels))
            skips.append(channels)
        for _ in range(blocks[i]):
            encoder.append(Step("block", channels, width, attentions[i], attentions[i] != "none"))
            channels = width
            skips.append(channels)
    middle = (
        Step("block", channels, channels, mid_attention, context=True),
        Step("block", channels, channels),
    )
    decoder: list[Step] = []
    for i, width in reversed(list(enumerate(widths))):
        for n in range(blocks[i] + 1):
            kind = "none" if last_only and n < blocks[i] else attentions[i]
            decoder.append(Step("block", channels + skips.pop(), width, kind, kind != "none", joins=True))
            channels = width
        if i:
            decoder.append(Step("up", channels, channels))
    return Plan(tuple(encoder), middle, tuple(decoder), channels)
