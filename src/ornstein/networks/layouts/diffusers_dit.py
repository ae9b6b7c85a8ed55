"""diffusers' ``DiTTransformer2DModel`` as a :class:`ornstein.networks.DiT`, and back.

diffusers embeds time and class anew in every block, from copies of the same weights, and spaces its sinusoids as DDPM
does, 10000^(-i/127), where DiT's own code has 10000^(-i/128): the two are different functions of the step, and no
change of weights turns one into the other. A network that comes in gets ``noise_embedding=ddpm``, which is that spacing
with the sines first; one with ``noise_embedding=sinusoidal`` that goes out needs ``downscale_freq_shift = 0`` on
diffusers' side. Its second norm's epsilon is 1e-5 unless ``norm_eps`` says 1e-6, as ours: 1e-5 of the output or less.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.networks.dit import DiT
from ornstein.networks.layouts import Converted, listed, shift_noise
from ornstein.networks.layouts.dit import checked, read_arguments, renamed

_EMBEDDER = {
    "timestep_embedder.linear_1": "embed.mlp.0",
    "timestep_embedder.linear_2": "embed.mlp.2",
    "class_embedder.embedding_table": "embed.label",
}
_AROUND = {"pos_embed.proj": "patches", "proj_out_1": "out_modulation", "proj_out_2": "out"}
_BLOCK = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "out",
    "ff.net.0.proj": "mlp_in",
    "ff.net.2": "mlp_out",
    "norm1.linear": "modulation",
    **{f"norm1.emb.{theirs}": ours for theirs, ours in _EMBEDDER.items()},
}
# Arguments of our DiT that diffusers' has no counterpart of, with the only value that fits.
_FIXED = {
    "text_dim": None,
    "pooled_dim": None,
    "concat_channels": 0,
    "conditioning": "adaln_zero",
    "positions": "sincos",
    "norm": "layer",
    "qk_norm": None,
    "qkv_bias": True,
    "mlp": "gelu",
    "mlp_ratio": 4.0,
    "long_skips": False,
    "registers": 0,
    "noise_scale": 1.0,
}


def recognise(state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None) -> bool:
    """Whether a state dict is diffusers' DiT's."""
    return "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight" in state and "proj_out_2.weight" in state


def convert(
    state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None, heads: int | None = None
) -> Converted:
    """The network, with ``noise_embedding=ddpm``.

    Args:
        state: the model's weights.
        config: the folder's ``config.json``: heads and size are read from it.
        heads: attention heads, where there is no config; None: those of the published DiT of this width.

    Raises:
        OrnsteinError: weights are missing or of another shape, or blocks embed time or class differently.
    """
    config = config or {}
    mapped, unmapped = renamed(state, _AROUND, "transformer_blocks", _BLOCK)
    _share_embedders(mapped)
    for index in range(_depth(mapped)):
        for part in ("weight", "bias"):
            three = [mapped.pop(f"blocks.{index}.{name}.{part}", None) for name in "qkv"]
            if all(each is not None for each in three):
                mapped[f"blocks.{index}.qkv.{part}"] = torch.cat([each for each in three if each is not None])
    arguments = read_arguments(mapped, heads=heads or config.get("num_attention_heads"))
    arguments |= {"image_size": config.get("sample_size"), "noise_embedding": "ddpm"}
    first = shift_noise(mapped["embed.mlp.0.weight"], by=-1.0, frequencies=_frequencies(endpoint=True))
    mapped["embed.mlp.0.weight"] = _swapped(first)
    mapped["noise.values"] = torch.tensor([1.0, 0.0, 1.0])
    learned = arguments["out_channels"] == 2 * arguments["in_channels"]
    return Converted(
        "ornstein.networks.DiT",
        arguments,
        checked(arguments, mapped),
        unmapped=tuple(unmapped),
        suggest=("scheduler=linear", "objective=hybrid" if learned else "objective=eps"),
    )


def to_diffusers(
    arguments: Mapping[str, Any], state: Mapping[str, Tensor], *, shift: float = 0.0, classes: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and weights of a ``DiTTransformer2DModel`` that computes what our network does.

    With ``noise_embedding=sinusoidal`` only if ``downscale_freq_shift`` is set to 0 on the time projection of every
    block afterwards (``norm1.emb.time_proj``); with ``ddpm`` as it is.

    Args:
        arguments: of our `DiT`; those left out have its defaults, and others than its are passed over.
        state: our weights.
        shift: our noise condition minus the step that diffusers will hand to the network: 1 where the schedule is a
            table of 1000 steps, 0 where both get the same number.
        classes: rows of the label table before the null class, for a pipeline whose null class has a fixed number
            (diffusers' own: 1000); rows without a class are the null class's. None: as many as there are classes, or
            one of zeros for an unconditional network, whose label is then always 0.

    Raises:
        OrnsteinError: an option that diffusers' DiT does not have, or no square image size.
    """
    defaults = {name: each.default for name, each in inspect.signature(DiT).parameters.items()}
    told = {**defaults, **{name: value for name, value in arguments.items() if name in defaults}}
    other = [f"{name}={told[name]}" for name, value in _FIXED.items() if told[name] != value]
    if told["noise_embedding"] not in ("sinusoidal", "ddpm"):
        other.append(f"noise_embedding={told['noise_embedding']}")
    if other:
        raise OrnsteinError(
            f"diffusers' DiTTransformer2DModel has no counterpart of {listed(other)}: export to safetensors or onnx "
            "instead."
        )
    size = told["image_size"]
    sides = {size} if isinstance(size, int | None) else set(size)
    if None in sides or len(sides) != 1:
        raise OrnsteinError(f"diffusers' DiTTransformer2DModel is made for one square size, got image_size={size}.")
    hidden, channels, patch, _ = state["patches.weight"].shape
    rows = _label_rows(state.get("embed.label.weight"), classes, state["patches.weight"].new_zeros(hidden))
    ddpm = told["noise_embedding"] == "ddpm"
    first = state["embed.mlp.0.weight"]
    first = shift_noise(
        _swapped(first) if ddpm else first, by=shift + told["noise_offset"], frequencies=_frequencies(endpoint=ddpm)
    )
    config = {
        "num_attention_heads": told["heads"],
        "attention_head_dim": hidden // told["heads"],
        "in_channels": channels,
        "out_channels": state["out.weight"].shape[0] // patch**2,
        "num_layers": _depth(state),
        "sample_size": sides.pop(),
        "patch_size": patch,
        "num_embeds_ada_norm": len(rows) - 1,
        "norm_eps": 1e-6,
    }
    shared = {**state, "embed.mlp.0.weight": first, "embed.label.weight": rows}
    return config, _to_their_names(shared)


def _share_embedders(mapped: dict[str, Tensor]) -> None:
    """Keep one copy of the embedders that every block has.

    Raises:
        OrnsteinError: they differ.
    """
    copies: dict[str, list[str]] = {}
    for key in mapped:
        if ".embed." in key:
            copies.setdefault(key.split(".", 2)[2], []).append(key)
    for name, keys in copies.items():
        first = mapped[keys[0]]
        differ = [key for key in keys if not torch.equal(mapped[key], first)]
        if differ:
            raise OrnsteinError(
                f"Time and class are embedded once here, and these differ from the first block's: {listed(differ)}."
            )
        for key in keys:
            del mapped[key]
        mapped[name] = first


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[1] for key in state if key.startswith("blocks.")})


def _to_their_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    theirs: dict[str, Tensor] = {}

    def write(their_name: str, our_name: str) -> None:
        for part in ("weight", "bias"):
            if f"{our_name}.{part}" in state:
                theirs[f"{their_name}.{part}"] = state[f"{our_name}.{part}"].contiguous()

    for their_name, our_name in _AROUND.items():
        write(their_name, our_name)
    for index in range(_depth(state)):
        block = f"transformer_blocks.{index}"
        for their_name, our_name in _EMBEDDER.items():
            write(f"{block}.norm1.emb.{their_name}", our_name)
        for their_name, our_name in _BLOCK.items():
            if not our_name.startswith("embed."):
                write(f"{block}.{their_name}", f"blocks.{index}.{our_name}")
        for part in ("weight", "bias"):
            three = state[f"blocks.{index}.qkv.{part}"].chunk(3)
            for name, value in zip("qkv", three, strict=True):
                theirs[f"{block}.attn1.to_{name}.{part}"] = value.clone()
    return theirs


def _label_rows(table: Tensor | None, classes: int | None, zeros: Tensor) -> Tensor:
    """The label table with its null row at ``classes``."""
    if table is None:
        return zeros.expand((classes or 1) + 1, -1).clone()
    if classes is None:
        return table
    if classes < len(table) - 1:
        raise OrnsteinError(f"classes={classes} leaves no row for each of the network's {len(table) - 1} classes.")
    return torch.cat([table[:-1], table[-1:].expand(classes + 2 - len(table), -1)])


def _frequencies(*, endpoint: bool, half: int = 128) -> Tensor:
    return 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - endpoint))


def _swapped(weight: Tensor) -> Tensor:
    """Columns with their halves, of cosines and of sines, exchanged."""
    return weight.roll(weight.shape[1] // 2, dims=1)
