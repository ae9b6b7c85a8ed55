"""U-Nets: ours and diffusers' ``UNet2DModel``, wherever the two are the same function.

Both are DDPM's U-Net. Names differ, our attention holds queries, keys and values as one 1x1 convolution, and diffusers
counts time steps from 0 where our noise condition counts them from 1 (:func:`ornstein.networks.layouts.shift_noise`).

Source: Ho et al. 2020 (arXiv 2006.11239); diffusers' UNet2DModel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.networks.layouts import Converted, shift_noise
from ornstein.networks.layouts.diffusers_unet_config import (
    EMBEDDINGS,
    arguments_from_config,
    config_from_arguments,
    layout_steps,
    with_defaults,
)
from ornstein.networks.layouts.kl import modern
from ornstein.networks.unet_plan import Step


def recognise(state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None) -> bool:
    """Whether a state dict is a ``UNet2DModel``'s of diffusers (a text-conditional one holds transformers)."""
    names = ("conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight")
    return all(name in state for name in names) and not any(".transformer_blocks." in name for name in state)


def convert(
    state: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    noise_offset: float = 1.0,
    null_row: bool = True,
) -> Converted:
    """A ``UNet2DModel`` of diffusers as a :class:`ornstein.networks.UNet`.

    Args:
        state: its state dict.
        config: its config.
        noise_offset: our noise condition minus the time step that it was trained with.
        null_row: the last row of its class table is the null class, as in ours; False adds one, the others' mean.

    Raises:
        OrnsteinError: there is no config, or it describes a network that ours is not.
    """
    if config is None:
        raise OrnsteinError(
            "a UNet2DModel's weights alone do not say its number of groups and heads: give the folder with its "
            "config.json."
        )
    left = {modern(name): tensor for name, tensor in state.items()}
    table = left.get("class_embedding.weight")
    if table is not None and not null_row:
        left["class_embedding.weight"] = torch.cat([table, table.mean(0, keepdim=True)])
    arguments = arguments_from_config(config, classes=None if table is None else len(table) - null_row)
    ours: dict[str, Tensor] = {}
    for name, theirs, kind in _layers(arguments):
        if kind == "attention":
            ours |= _join_attention(left, name, theirs)
            continue
        for leaf in ("weight", "bias"):
            if f"{theirs}.{leaf}" in left:
                ours[f"{name}.{leaf}"] = left.pop(f"{theirs}.{leaf}")
    ours["embed.mlp.0.weight"] = _shifted(ours["embed.mlp.0.weight"], -noise_offset, arguments["noise_embedding"])
    suggest = ("conditioner=none",) if table is None else ()
    return Converted("ornstein.networks.UNet", arguments, ours, tuple(left), suggest=suggest)


def to_diffusers(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], *, noise_offset: float = 1.0
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state dict of the ``UNet2DModel`` that is our network.

    What diffusers does around the network instead of within it is left out of both: folding patches into channels, and
    labels joined as channels.

    Args:
        state: of a :class:`ornstein.networks.UNet`.
        arguments: its constructor's.
        noise_offset: our noise condition minus the time step that the network will be given.

    Raises:
        OrnsteinError: an option that ``UNet2DModel`` has not; names it.
    """
    full = with_defaults(arguments)
    config = config_from_arguments(full)
    theirs: dict[str, Tensor] = {}
    for name, other, kind in _layers(full):
        if kind == "attention":
            theirs |= _split_attention(state, name, other)
            continue
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in state:
                theirs[f"{other}.{leaf}"] = state[f"{name}.{leaf}"].detach().clone()
    first = "time_embedding.linear_1.weight"
    theirs[first] = _shifted(theirs[first], noise_offset, full["noise_embedding"])
    return config, theirs


def _layers(full: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Every layer as (our name, diffusers' name, layer or attention), in the order of the forward pass."""
    yield "embed.mlp.0", "time_embedding.linear_1", "layer"
    yield "embed.mlp.2", "time_embedding.linear_2", "layer"
    yield "embed.label", "class_embedding", "layer"
    yield "stem", "conv_in", "layer"
    encoder, middle, decoder = layout_steps(full)
    level = count = 0
    for index, step in enumerate(encoder):
        if step.kind == "down":
            yield from _resampling(f"encoder.{index}", f"down_blocks.{level}.downsamplers.0", full)
            level, count = level + 1, 0
        else:
            yield from _stage(f"encoder.{index}", f"down_blocks.{level}", count, step)
            count += 1
    for index, step in enumerate(middle):
        yield from _stage(f"middle.{index}", "mid_block", index, step)
    level = count = 0
    for index, step in enumerate(decoder):
        if step.kind == "up":
            yield from _resampling(f"decoder.{index}", f"up_blocks.{level}.upsamplers.0", full)
            level, count = level + 1, 0
        else:
            yield from _stage(f"decoder.{index}", f"up_blocks.{level}", count, step)
            count += 1
    yield "out_norm", "conv_norm_out", "layer"
    yield "out", "conv_out", "layer"


def _resampling(ours: str, theirs: str, full: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    if full["resampling"] == "residual":
        yield from _block(f"{ours}.block", theirs)
    else:
        yield f"{ours}.conv", f"{theirs}.conv", "layer"


def _block(ours: str, theirs: str) -> Iterator[tuple[str, str, str]]:
    names = {"condition": "time_emb_proj", "shortcut": "conv_shortcut"}
    for leaf in ("norm1", "conv1", "condition", "norm2", "conv2", "shortcut"):
        yield f"{ours}.{leaf}", f"{theirs}.{names.get(leaf, leaf)}", "layer"


def _stage(ours: str, theirs: str, number: int, step: Step) -> Iterator[tuple[str, str, str]]:
    yield from _block(f"{ours}.block", f"{theirs}.resnets.{number}")
    if step.attention == "full":
        yield f"{ours}.attention", f"{theirs}.attentions.{number}", "attention"


def _split_attention(state: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """Our 1x1 convolutions as diffusers' linear layers."""
    split = {
        f"{theirs}.group_norm.{leaf}": state[f"{ours}.norm.{leaf}"].detach().clone() for leaf in ("weight", "bias")
    }
    for leaf in ("weight", "bias"):
        for name, part in zip(("to_q", "to_k", "to_v"), state[f"{ours}.qkv.{leaf}"].chunk(3), strict=True):
            split[f"{theirs}.{name}.{leaf}"] = part.detach().reshape(part.shape[:2]).clone()
        part = state[f"{ours}.out.{leaf}"]
        split[f"{theirs}.to_out.0.{leaf}"] = part.detach().reshape(part.shape[:2]).clone()
    return split


def _join_attention(left: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """The reverse; what is taken leaves ``left``."""
    joined = {f"{ours}.norm.{leaf}": left.pop(f"{theirs}.group_norm.{leaf}") for leaf in ("weight", "bias")}
    weights = [_as_matrix(left.pop(f"{theirs}.{name}.weight")) for name in ("to_q", "to_k", "to_v")]
    joined[f"{ours}.qkv.weight"] = torch.cat(weights)[:, :, None, None]
    joined[f"{ours}.qkv.bias"] = torch.cat([left.pop(f"{theirs}.{name}.bias") for name in ("to_q", "to_k", "to_v")])
    joined[f"{ours}.out.weight"] = _as_matrix(left.pop(f"{theirs}.to_out.0.weight"))[:, :, None, None]
    joined[f"{ours}.out.bias"] = left.pop(f"{theirs}.to_out.0.bias")
    return joined


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[:2])


def shift_first_layer(weight: Tensor, *, by: float, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """:func:`shift_noise` for a layer after diffusers' time features, in the order and spacing of its config.

    Args:
        weight: (out, features) of ``time_embedding.linear_1``.
        by: the shift of the time step.
        flip_sin_to_cos: cosines come first.
        freq_shift: what the spacing of the frequencies leaves out of their number.
    """
    if by == 0:
        return weight
    half = weight.shape[1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - freq_shift))
    halves = [weight[:, :half], weight[:, half : 2 * half]]
    ordered = halves if flip_sin_to_cos else halves[::-1]
    turned = shift_noise(torch.cat(ordered, dim=1), by=by, frequencies=frequencies)
    halves = [turned[:, :half], turned[:, half:]]
    return torch.cat([*(halves if flip_sin_to_cos else halves[::-1]), weight[:, 2 * half :]], dim=1)


def _shifted(weight: Tensor, by: float, embedding: str) -> Tensor:
    flip, shift = EMBEDDINGS[embedding]
    return shift_first_layer(weight, by=by, flip_sin_to_cos=flip, freq_shift=shift)
