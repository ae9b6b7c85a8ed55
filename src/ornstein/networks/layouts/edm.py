"""NVlabs/edm's networks, ``SongUNet`` (DDPM++, NCSN++) and ``DhariwalUNet`` (ADM), alone or in ``EDMPrecond``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.networks.layouts import Converted, Source

_BLOCK = {"norm0": "norm1", "conv0": "conv1", "affine": "condition", "norm1": "norm2", "conv1": "conv2"}
_HEAD_DIM = 64  # of DhariwalUNet; SongUNet has one head


def recognise(state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None) -> bool:
    """Whether a state dict is one of theirs."""
    names = {name.removeprefix("model.") for name in state}
    return {"map_layer0.weight", "map_layer1.weight"} <= names and any(
        re.match(r"dec\.\d+x\d+_in0\.qkv\.weight", name) for name in names
    )


def convert(state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None) -> Converted:
    """The network, and EDM's schedule and objective beside it.

    Raises:
        OrnsteinError: a part that this layout always has is missing, or an architecture that is none of the three.
    """
    source = Source({name.removeprefix("model."): value for name, value in state.items()})
    filters = [value for name, value in source.left.items() if name.endswith("resample_filter")]
    source.drop(*[name for name in source.left if name.endswith("resample_filter")])
    sizes = sorted({int(match[1]) for name in source.left if (match := re.match(r"enc\.(\d+)x", name))}, reverse=True)
    song = "out_norm.weight" not in source.left
    counts = [_blocks(source.left, size) for size in sizes]
    heads = 1 if song else None
    ours = source.layer("map_layer0", "embed.mlp.0") | source.layer("map_layer1", "embed.mlp.2")
    embedding, features = ours["embed.mlp.0.weight"].shape
    classes, augment = _conditions(source, ours, song=song)
    ours |= source.layer(f"enc.{sizes[0]}x{sizes[0]}_conv", "stem")
    stem, in_channels = ours["stem.weight"].shape[:2]
    base = stem if song else embedding // 4
    widths, attentions = _encoder(source, ours, sizes, counts, heads=heads)
    progressive = any(name.startswith("progressive.") for name in ours)
    _decoder(source, ours, sizes, counts, heads=heads)
    top = f"dec.{sizes[0]}x{sizes[0]}_aux"
    ours |= source.layer(f"{top}_norm" if song else "out_norm", "out_norm")
    ours |= source.layer(f"{top}_conv" if song else "out_conv", "out")
    fourier = "map_noise.freqs" in source.left
    if fourier:
        ours["embed.features.frequencies"] = source.take("map_noise.freqs")
    noise = ("ncsnpp" if fourier else "ddpm") if song else "sinusoidal"
    arguments = {
        "in_channels": in_channels,
        "out_channels": ours["out.weight"].shape[0],
        "image_size": sizes[0],
        "num_classes": classes,
        "label_embedding": "mapped" if song else "table",
        "augment_dim": augment,
        "base_channels": base,
        "channel_mults": [_ratio(width, base) for width in widths],
        "stem_channels": stem,
        "num_blocks": counts,
        "resampling": "residual_projected" if song else "residual",
        "resample_filter": _taps(filters),
        "progressive_input": progressive,
        "attention": attentions,
        "mid_attention": "full",
        "decoder_attention": "last" if song else "all",
        "heads": heads,
        "head_dim": None if song else _HEAD_DIM,
        "groups": 32,
        "group_channels": 4,
        "norm_eps": 1e-6 if song else 1e-5,
        "scale_shift": not song,
        "skip_scale": math.sqrt(0.5) if song else 1.0,
        "noise_embedding": noise,
        "embedding_features": features,
        "embedding_channels": embedding,
    }
    return Converted(
        "ornstein.networks.UNet",
        arguments,
        ours,
        unmapped=tuple(sorted(source.left)),
        dropped=tuple(source.dropped),
        suggest=(
            "scheduler=edm",
            "objective=edm",
            "sampler=heun",
            "sampler/grid=karras",
            "sampler.steps=18",
            *([] if classes is None else ["conditioner.dropout=0"]),
        ),
        note="the file does not say how it is preconditioned: EDM's own way is assumed, with sigma_data 0.5.",
    )


def _conditions(source: Source, ours: dict[str, Tensor], *, song: bool) -> tuple[int | None, int | None]:
    """Labels and augmentation parameters; gives how many there are of each, None for none."""
    classes = augment = None
    if "map_label.weight" in source.left:
        weight = source.take("map_label.weight")
        classes = weight.shape[1]
        if song:
            ours["embed.label.weight"] = weight
            bias = source.left.get("map_label.bias")
            ours["embed.label.bias"] = torch.zeros(len(weight)) if bias is None else source.take("map_label.bias")
        else:  # without a label theirs sees a vector of zeros
            ours["embed.label.weight"] = torch.cat([weight.T, torch.zeros_like(weight.T[:1])])
    if "map_augment.weight" in source.left:
        ours["embed.augment.weight"] = source.take("map_augment.weight")
        augment = ours["embed.augment.weight"].shape[1]
    return classes, augment


def _encoder(
    source: Source, ours: dict[str, Tensor], sizes: list[int], counts: list[int], *, heads: int | None
) -> tuple[list[int], list[str]]:
    """Fills in the way down; gives each level's width and kind of attention."""
    widths, attentions = [], []
    place = 0
    for level, size in enumerate(sizes):
        name = f"enc.{size}x{size}"
        if level:
            ours |= _block(source, f"{name}_down", f"encoder.{place}", heads=heads)
            place += 1
            if f"{name}_aux_residual.weight" in source.left:
                ours |= source.layer(f"{name}_aux_residual", f"progressive.{level - 1}.conv")
        for i in range(counts[level]):
            ours |= _block(source, f"{name}_block{i}", f"encoder.{place}", heads=heads)
            place += 1
        last = f"encoder.{place - 1}"
        widths.append(ours[f"{last}.block.conv1.weight"].shape[0])
        attentions.append("full" if f"{last}.attention.qkv.weight" in ours else "none")
    return widths, attentions


def _decoder(
    source: Source, ours: dict[str, Tensor], sizes: list[int], counts: list[int], *, heads: int | None
) -> None:
    """Fills in the middle and the way up."""
    place = 0
    for level, size in reversed(list(enumerate(sizes))):
        name = f"dec.{size}x{size}"
        if level == len(sizes) - 1:
            for i in (0, 1):
                ours |= _block(source, f"{name}_in{i}", f"middle.{i}", heads=heads)
        else:
            ours |= _block(source, f"{name}_up", f"decoder.{place}", heads=heads)
            place += 1
        for i in range(counts[level] + 1):
            ours |= _block(source, f"{name}_block{i}", f"decoder.{place}", heads=heads)
            place += 1


def _block(source: Source, theirs: str, ours: str, *, heads: int | None) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, our_name in _BLOCK.items():
        state |= source.layer(f"{theirs}.{name}", f"{ours}.block.{our_name}")
    if f"{theirs}.skip.weight" in source.left:
        state |= source.layer(f"{theirs}.skip", f"{ours}.block.shortcut")
    if f"{theirs}.qkv.weight" in source.left:
        state |= source.layer(f"{theirs}.norm2", f"{ours}.attention.norm")
        qkv = source.layer(f"{theirs}.qkv", f"{ours}.attention.qkv")
        state |= {name: _by_kind(value, heads) for name, value in qkv.items()}
        state |= source.layer(f"{theirs}.proj", f"{ours}.attention.out")
    return state


def _by_kind(projection: Tensor, heads: int | None) -> Tensor:
    """Theirs lies as (heads, channels, 3), ours as (3, heads, channels)."""
    width = projection.shape[0] // 3
    heads = max(1, width // _HEAD_DIM) if heads is None else heads
    return projection.unflatten(0, (heads, width // heads, 3)).movedim(2, 0).flatten(0, 2).contiguous()


def _blocks(state: Mapping[str, Tensor], size: int) -> int:
    return sum(bool(re.fullmatch(rf"enc\.{size}x{size}_block\d+\.conv0\.weight", name)) for name in state)


def _ratio(width: int, base: int) -> int | float:
    return width // base if width % base == 0 else width / base


def _taps(filters: list[Tensor]) -> list[int]:
    """The filter of resampling, from its buffers: the outer product of [1, 1] or [1, 3, 3, 1] with itself."""
    size = filters[0].shape[-1] if filters else 2
    taps = {2: [1, 1], 4: [1, 3, 3, 1]}.get(size)
    if taps is None:
        raise OrnsteinError(f"a resampling filter of {size} taps is none that DDPM++, NCSN++ or ADM have (2 or 4).")
    return taps
