"""openai/guided-diffusion's ``UNetModel`` (ADM), and improved-diffusion's before it, as a ``UNet``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.networks.layouts import Converted, Source, shift_noise

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "condition",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}


def recognise(state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None) -> bool:
    """Whether a state dict is such a U-Net's: it is none with a text transformer in it, and no classifier."""
    return {
        "input_blocks.0.0.weight",
        "time_embed.0.weight",
        "middle_block.1.qkv.weight",
        "output_blocks.0.0.in_layers.2.weight",
        "out.2.weight",
    } <= set(state)


def convert(
    state: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    head_dim: int = 64,
    heads: int | None = None,
    new_attention_order: bool = False,
    image_size: int | None = None,
    concat_channels: int = 0,
    diffusion_steps: int = 1000,
) -> Converted:
    """The network.

    Args:
        state: its state dict.
        config: not used.
        head_dim: channels of an attention head (``num_head_channels``).
        heads: attention heads (``num_heads``), in place of ``head_dim``.
        new_attention_order: as the checkpoint was trained with: queries of all heads before all keys. Theirs is True
            for the ImageNet network at 64x64, and False elsewhere.
        image_size: what it was trained on; None: such that its coarsest level has 8 x 8 positions, as all of theirs.
        concat_channels: of its input channels, those of a conditioning image (3 in their upsampling networks).
        diffusion_steps: T; where it is not 1000, steps were rescaled to 1000 (``rescale_timesteps``).

    Raises:
        OrnsteinError: a part that this layout always has is missing, or widths that do not split into heads.
    """
    source = Source(dict(state))
    plan = _plan(source.left)
    if image_size is None:
        image_size = 8 * 2 ** (len(plan["channel_mults"]) - 1)
    classes = source.left["label_emb.weight"].shape[0] if "label_emb.weight" in source.left else None
    order = _Order(heads, head_dim, new_attention_order)
    first = source.layer("time_embed.0", "embed.mlp.0")
    first["embed.mlp.0.weight"] = shift_noise(first["embed.mlp.0.weight"], by=-1000.0 / diffusion_steps)
    ours = {**first, **source.layer("time_embed.2", "embed.mlp.2"), **source.layer("input_blocks.0.0", "stem")}
    in_channels = ours["stem.weight"].shape[1]
    if classes is not None:
        table = source.take("label_emb.weight")
        # Theirs has no null class: without a label nothing is added.
        ours["embed.label.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    for i in range(1, 1 + _highest(source.left, "input_blocks")):
        ours |= _entry(source, f"input_blocks.{i}", f"encoder.{i - 1}", order)
    ours |= _resnet(source, "middle_block.0", "middle.0.block")
    ours |= _attention(source, "middle_block.1", "middle.0.attention", order)
    ours |= _resnet(source, "middle_block.2", "middle.1.block")
    place = 0
    for i in range(1 + _highest(source.left, "output_blocks")):
        resampled = _resampling(source.left, f"output_blocks.{i}")
        ours |= _entry(source, f"output_blocks.{i}", f"decoder.{place}", order, but=resampled)
        place += 1
        if resampled is not None:
            ours |= _entry(source, f"output_blocks.{i}", f"decoder.{place}", order, only=resampled)
            place += 1
    ours |= {**source.layer("out.0", "out_norm"), **source.layer("out.2", "out")}
    out_channels = ours["out.weight"].shape[0]
    learned = out_channels == 2 * (in_channels - concat_channels)
    scheduler = "cosine" if image_size == 64 else "linear"
    return Converted(
        "ornstein.networks.UNet",
        {
            "in_channels": in_channels - concat_channels,
            "out_channels": out_channels,
            "image_size": image_size,
            "num_classes": classes,
            "concat_channels": concat_channels,
            **plan,
            "heads": heads,
            "head_dim": head_dim if heads is None else None,
        },
        ours,
        unmapped=tuple(sorted(source.left)),
        suggest=(
            f"scheduler={scheduler}",
            *(["objective=hybrid", "sampler=ddpm", "sampler.variance=learned"] if learned else ["objective=eps"]),
            *([] if classes is None else ["conditioner.dropout=0"]),
        ),
        note=f"the file does not say these: attention heads of {head_dim} channels"
        f"{f' ({heads} heads)' if heads else ''}, attention in the {'new' if new_attention_order else 'legacy'} order, "
        f"images of {image_size} x {image_size}, {scheduler} schedule.",
    )


class _Order:
    """How queries, keys and values of the heads lie in a projection, and as ours has them: (3, heads, channels)."""

    def __init__(self, heads: int | None, head_dim: int, new: bool) -> None:
        self.heads, self.head_dim, self.new = heads, head_dim, new

    def ours(self, projection: Tensor) -> Tensor:
        width = projection.shape[0] // 3
        heads = self.heads if self.heads is not None else max(1, width // self.head_dim)
        if width % heads:
            raise OrnsteinError(f"{width} channels do not split into {heads} attention heads: give another head_dim.")
        if self.new:
            return projection
        return projection.unflatten(0, (heads, 3, width // heads)).transpose(0, 1).flatten(0, 2)


def _plan(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of our U-Net that shapes and names tell."""
    entries = 1 + _highest(state, "output_blocks")
    ups = [found for i in range(entries) if (found := _resampling(state, f"output_blocks.{i}")) is not None]
    levels = 1 + len(ups)
    blocks = entries // levels - 1
    base = state["time_embed.0.weight"].shape[1]
    # Entry 0 is the stem; a level's blocks are followed by what halves the resolution.
    firsts = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [state[f"input_blocks.{first}.0.in_layers.2.weight"].shape[0] for first in firsts]
    mults = [width / base for width in widths]
    gives = state["input_blocks.1.0.in_layers.2.weight"].shape[0]
    residual = any(name.endswith("in_layers.2.weight") for up in ups for name in state if name.startswith(f"{up}."))
    return {
        "base_channels": base,
        "channel_mults": [int(mult) if mult == int(mult) else mult for mult in mults],
        "stem_channels": state["input_blocks.0.0.weight"].shape[0],
        "num_blocks": blocks,
        "resampling": "residual" if residual or not ups else "conv",
        "attention": ["full" if f"input_blocks.{first}.1.qkv.weight" in state else "none" for first in firsts],
        "mid_attention": "full",
        "decoder_attention": "all",
        "groups": 32,
        "norm_eps": 1e-5,
        "scale_shift": state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * gives,
        "noise_embedding": "sinusoidal",
        "embedding_channels": state["time_embed.2.weight"].shape[0],
    }


def _highest(state: Mapping[str, Tensor], prefix: str) -> int:
    return max(int(match[1]) for name in state if (match := re.match(rf"{prefix}\.(\d+)\.", name)))


def _resampling(state: Mapping[str, Tensor], entry: str) -> str | None:
    """The part of a decoder's entry that doubles the resolution, a residual block or a convolution, if it has one."""
    for place in (1, 2):
        if f"{entry}.{place}.conv.weight" in state or f"{entry}.{place}.in_layers.2.weight" in state:
            return f"{entry}.{place}"
    return None


def _entry(
    source: Source, theirs: str, ours: str, order: _Order, *, but: str | None = None, only: str | None = None
) -> dict[str, Tensor]:
    """The parts of one of their entries as one of ours: a residual block, attention, or a change of resolution."""
    state: dict[str, Tensor] = {}
    for part in (f"{theirs}.{place}" for place in range(3)):
        if part == but or (only is not None and part != only):
            continue
        if f"{part}.in_layers.2.weight" in source.left:
            state |= _resnet(source, part, f"{ours}.block")
        elif f"{part}.qkv.weight" in source.left:
            state |= _attention(source, part, f"{ours}.attention", order)
        elif f"{part}.op.weight" in source.left:
            state |= source.layer(f"{part}.op", f"{ours}.conv")
        elif f"{part}.conv.weight" in source.left:
            state |= source.layer(f"{part}.conv", f"{ours}.conv")
    return state


def _resnet(source: Source, theirs: str, ours: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, our_name in _RESNET.items():
        state |= source.layer(f"{theirs}.{name}", f"{ours}.{our_name}")
    if f"{theirs}.skip_connection.weight" in source.left:
        state |= source.layer(f"{theirs}.skip_connection", f"{ours}.shortcut")
    return state


def _attention(source: Source, theirs: str, ours: str, order: _Order) -> dict[str, Tensor]:
    """Their 1-D convolutions over positions are ours of 1 x 1."""
    qkv, out = source.layer(f"{theirs}.qkv", f"{ours}.qkv"), source.layer(f"{theirs}.proj_out", f"{ours}.out")
    qkv = {name: order.ours(value) for name, value in qkv.items()}
    flat = {name: value.flatten(1)[..., None, None] if value.ndim > 1 else value for name, value in (qkv | out).items()}
    return {**source.layer(f"{theirs}.norm", f"{ours}.norm"), **flat}
