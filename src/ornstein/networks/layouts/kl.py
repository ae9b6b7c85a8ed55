"""Autoencoders: ours and diffusers' ``AutoencoderKL``, which are the same function under other names.

Every tensor keeps its shape. What differs is the scaling of latents: ours has a mean and a scale a channel,
``z = (h - shift) * scale``, diffusers a number in the config. Going out, :func:`fold_scale` puts ours into the 1x1
convolutions around the latents, so that what diffusers calls a latent is what our network diffuses.

Source: Esser et al. 2021 (arXiv 2012.09841); diffusers' AutoencoderKL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.networks.layouts import Converted

_MIDDLE = (
    ("middle.block1.", "mid_block.resnets.0."),
    ("middle.block2.", "mid_block.resnets.1."),
    ("middle.attention.norm.", "mid_block.attentions.0.group_norm."),
    ("middle.attention.q.", "mid_block.attentions.0.to_q."),
    ("middle.attention.k.", "mid_block.attentions.0.to_k."),
    ("middle.attention.v.", "mid_block.attentions.0.to_v."),
    ("middle.attention.out.", "mid_block.attentions.0.to_out.0."),
    ("stem.", "conv_in."),
    ("norm.", "conv_norm_out."),
    ("out.", "conv_out."),
)


def _side(side: str, blocks: str, resample: str) -> list[tuple[str, str]]:
    levels = [
        ("levels.#.blocks.#.skip.", f"{blocks}.#.resnets.#.conv_shortcut."),
        ("levels.#.blocks.#.", f"{blocks}.#.resnets.#."),
        ("levels.#.resample.conv.", f"{blocks}.#.{resample}.0.conv."),
    ]
    return [(f"{side}.{ours}", f"{side}.{theirs}") for ours, theirs in (*levels, *_MIDDLE)]


# Beginnings of names, ours and theirs; # is a number. The first that fits counts.
_RULES = [
    *_side("encoder", "down_blocks", "downsamplers"),
    *_side("decoder", "up_blocks", "upsamplers"),
    ("quant.", "quant_conv."),
    ("post_quant.", "post_quant_conv."),
]
# What old diffusers files call the projections of the attention.
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def recognise(state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None) -> bool:
    """Whether a state dict is an ``AutoencoderKL``'s of diffusers."""
    names = ("encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_out.weight")
    return all(name in state for name in names) and "quantize.embedding.weight" not in state


def convert(state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None) -> Converted:
    """An ``AutoencoderKL`` of diffusers as a :class:`ornstein.codecs.KLAutoencoder`, scale and shift from its config.

    Raises:
        OrnsteinError: there is no config, or it describes blocks that ours has not.
    """
    if config is None:
        raise OrnsteinError(
            "an AutoencoderKL's weights alone do not say its number of groups: give the folder with its config.json."
        )
    arguments = arguments_from_config(config)
    left = {modern(name): tensor for name, tensor in state.items()}
    ours: dict[str, Tensor] = {}
    unmapped = []
    for name, tensor in left.items():
        renamed = _rename(name, theirs=True)
        if renamed is None:
            unmapped.append(name)
        else:
            # Old files have the attention's projections as 1x1 convolutions.
            projection = ".attention." in renamed and tensor.ndim == 4
            ours[renamed] = tensor[:, :, 0, 0] if projection else tensor
    ours["scale"], ours["shift"] = _scale_from_config(config, int(arguments["channels"]))
    return Converted("ornstein.codecs.KLAutoencoder", arguments, ours, tuple(unmapped))


def to_diffusers(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state dict of the ``AutoencoderKL`` that is our autoencoder.

    Scale and shift of latents go into the config, as ``latents_std`` and ``latents_mean``, the way that diffusers'
    newer pipelines read them; for those that do not, :func:`fold_scale` comes first.

    Args:
        state: of a :class:`ornstein.codecs.KLAutoencoder`.
        arguments: its ``config``.

    Raises:
        OrnsteinError: a tensor that has no place there.
    """
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in ("scale", "shift"):
            continue
        renamed = _rename(name, theirs=False)
        if renamed is None:
            raise OrnsteinError(f"{name} of the autoencoder has no place in diffusers' AutoencoderKL.")
        theirs[renamed] = tensor.detach().clone()
    return config_from_arguments(arguments, scale=state["scale"], shift=state["shift"]), theirs


def vq_to_diffusers(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state dict of the ``VQModel`` that is a :class:`ornstein.codecs.VQAutoencoder`, its scale left out.

    Raises:
        OrnsteinError: a tensor that has no place there.
    """
    weights = {name: value for name, value in state.items() if not name.startswith("quantiser.")}
    same = {**arguments, "channels": arguments["encoded_channels"]}
    config, theirs = to_diffusers(weights, same)
    for name in ("latents_mean", "latents_std", "use_quant_conv", "use_post_quant_conv", "force_upcast"):
        config.pop(name)
    config |= {"num_vq_embeddings": arguments["codes"], "vq_embed_dim": arguments["channels"]}
    theirs["quantize.embedding.weight"] = state["quantiser.codebook"].detach().clone()
    return config, theirs


def config_from_arguments(arguments: Mapping[str, Any], *, scale: Tensor, shift: Tensor) -> dict[str, Any]:
    """``AutoencoderKL``'s config for the constructor arguments of ours and its scale and shift of latents."""
    levels = len(arguments["multipliers"])
    size = arguments["image_size"]
    return {
        "in_channels": arguments["image_channels"],
        "out_channels": arguments["image_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [arguments["width"] * multiplier for multiplier in arguments["multipliers"]],
        "layers_per_block": arguments["blocks"],
        "latent_channels": arguments["channels"],
        "norm_num_groups": arguments["groups"],
        "sample_size": size if isinstance(size, int) else max(size),
        "scaling_factor": 1.0,
        "latents_mean": shift.double().flatten().tolist(),
        "latents_std": (1 / scale.double()).flatten().tolist(),
        "mid_block_add_attention": arguments.get("attention", True),
        "use_quant_conv": arguments.get("quant_conv", True),
        "use_post_quant_conv": arguments.get("post_quant_conv", True),
        "force_upcast": True,
    }


def arguments_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of ours for an ``AutoencoderKL``'s config.

    Raises:
        OrnsteinError: blocks, activations or widths that ours has not.
    """
    expected = {
        "down_block_types": "DownEncoderBlock2D",
        "up_block_types": "UpDecoderBlock2D",
        "act_fn": "silu",
    }
    for key, only in expected.items():
        given = config.get(key, only)
        if set([given] if isinstance(given, str) else given) != {only}:
            raise OrnsteinError(f"{key}={given} of this AutoencoderKL is none of ours, which has {only} only.")
    if config.get("in_channels", 3) != config.get("out_channels", 3):
        raise OrnsteinError("an AutoencoderKL with other channels out than in has no place in ours.")
    widths = [int(width) for width in config.get("block_out_channels", (64,))]
    if any(width % widths[0] for width in widths):
        raise OrnsteinError(f"block_out_channels={widths}: ours has multiples of the first width only.")
    size = config.get("sample_size", 32)
    return {
        "image_channels": int(config.get("in_channels", 3)),
        "image_size": size if isinstance(size, int) else [int(side) for side in size],
        "channels": int(config.get("latent_channels", 4)),
        "width": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": int(config.get("layers_per_block", 1)),
        "groups": int(config.get("norm_num_groups", 32)),
        "attention": bool(config.get("mid_block_add_attention", True)),
        "quant_conv": bool(config.get("use_quant_conv", True)),
        "post_quant_conv": bool(config.get("use_post_quant_conv", True)),
    }


def fold_scale(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    r"""Our autoencoder with its scale and shift inside the convolutions around the latents, and 1 and 0 in their place.

    .. math:: \mu' = (\mu - \text{shift}) \cdot \text{scale}, \qquad \ln\sigma'^2 = \ln\sigma^2 + 2 \ln \text{scale},
              \qquad h = z / \text{scale} + \text{shift}

    each a linear map of channels, so that encoder and decoder stay the same functions of latents z. Where the
    autoencoder has no such convolutions, they are added as identities first.

    Args:
        state: of a :class:`ornstein.codecs.KLAutoencoder`.
        arguments: its ``config``.

    Returns:
        The state dict and the arguments of the autoencoder without a scale.
    """
    folded = {name: tensor.detach().clone() for name, tensor in state.items()}
    channels = int(arguments["channels"])
    scale, shift = (state[name].double().flatten() for name in ("scale", "shift"))
    for name, width in (("quant", 2 * channels), ("post_quant", channels)):
        if f"{name}.weight" not in folded:
            identity = torch.eye(width).to(state["scale"])
            folded[f"{name}.weight"], folded[f"{name}.bias"] = identity[:, :, None, None], torch.zeros_like(identity[0])
    gain = torch.cat([scale, torch.ones_like(scale)])
    offset = torch.cat([-shift * scale, 2 * scale.log()])
    weight, bias = folded["quant.weight"], folded["quant.bias"]
    folded["quant.weight"] = (weight.double() * gain[:, None, None, None]).to(weight.dtype)
    folded["quant.bias"] = (bias.double() * gain + offset).to(bias.dtype)
    weight, bias = folded["post_quant.weight"], folded["post_quant.bias"]
    folded["post_quant.weight"] = (weight.double() / scale[None, :, None, None]).to(weight.dtype)
    folded["post_quant.bias"] = (bias.double() + weight.double()[:, :, 0, 0] @ shift).to(bias.dtype)
    folded["scale"], folded["shift"] = torch.ones_like(state["scale"]), torch.zeros_like(state["shift"])
    return folded, {**arguments, "quant_conv": True, "post_quant_conv": True}


def _scale_from_config(config: Mapping[str, Any], channels: int) -> tuple[Tensor, Tensor]:
    """Scale and shift, (1, channels, 1, 1), of ``scaling_factor`` with ``shift_factor`` or means and deviations."""
    factor = float(config.get("scaling_factor", 0.18215))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    means: Sequence[float] = mean if mean is not None else [config.get("shift_factor") or 0.0] * channels
    deviations: Sequence[float] = std if std is not None else [1.0] * channels
    scale = factor / torch.tensor(deviations, dtype=torch.float64)
    shift = torch.tensor(means, dtype=torch.float64)
    return scale.float().reshape(1, channels, 1, 1), shift.float().reshape(1, channels, 1, 1)


def modern(name: str) -> str:
    """A name of today for one of an old diffusers file."""
    head, _, tail = name.rpartition(".attentions.0.")
    word, _, leaf = tail.partition(".")
    return f"{head}.attentions.0.{_OLD[word]}.{leaf}" if word in _OLD else name


def _rename(name: str, *, theirs: bool) -> str | None:
    """Our name of a tensor of theirs, or theirs of one of ours; None where no rule fits."""
    for ours, other in _RULES:
        source, target = (other, ours) if theirs else (ours, other)
        match = re.match("^" + re.escape(source).replace(r"\#", r"(\d+)"), name)
        if match:
            for number in match.groups():
                target = target.replace("#", number, 1)
            return target + name[match.end() :]
    return None
