"""What ``UNet2DModel``'s config and our U-Net's constructor arguments say of each other, and what has no word there."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ornstein.errors import OrnsteinError
from ornstein.networks.blocks import fit_groups
from ornstein.networks.unet import UNet
from ornstein.networks.unet_plan import Step, plan_unet

# Our noise embedding -> flip_sin_to_cos, freq_shift.
EMBEDDINGS = {"sinusoidal": (True, 0), "ddpm": (False, 1)}
_DOWN_PADDING = {"conv": 1, "conv_end": 0, "residual": 1}
_ONLY = {  # options of ours of which diffusers has one value
    "block": "resnet",
    "progressive_input": False,
    "skip_scale": 1.0,
    "label_embedding": "table",
    "text_dim": None,
    "pooled_dim": None,
    "augment_dim": None,
}
_THEIRS = {  # options of diffusers of which we have one value, with its defaults
    "act_fn": ("silu", "silu"),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "time_embedding_type": ("positional", "positional"),
}


def with_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of our U-Net's constructor, those given and the others' defaults; lists a level, not numbers."""
    parameters = inspect.signature(UNet.__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    full = {**defaults, **arguments}
    full["out_channels"] = full["in_channels"] if full["out_channels"] is None else full["out_channels"]
    for name in ("num_blocks", "attention"):
        if isinstance(full[name], int | str):
            full[name] = [full[name]] * len(full["channel_mults"])
    return full


def _widths(full: Mapping[str, Any]) -> list[int]:
    return [round(full["base_channels"] * mult) for mult in full["channel_mults"]]


def layout_steps(full: Mapping[str, Any]) -> tuple[tuple[Step, ...], tuple[Step, ...], tuple[Step, ...]]:
    """Encoder, middle and decoder of our U-Net with these arguments, all of them (:func:`with_defaults`)."""
    plan = plan_unet(
        _widths(full),
        stem=_widths(full)[0],
        blocks=list(full["num_blocks"]),
        attentions=list(full["attention"]),
        mid_attention=full["mid_attention"],
    )
    return plan.encoder, plan.middle, plan.decoder


def config_from_arguments(full: Mapping[str, Any]) -> dict[str, Any]:
    """``UNet2DModel``'s config for all arguments of our U-Net (:func:`with_defaults`).

    Raises:
        OrnsteinError: an option that it has no word for.
    """
    widths, patch = _widths(full), full["patch_size"] or 1
    for name, only in _ONLY.items():
        if full[name] != only:
            raise _refusal(name, full[name], f"it has {only}" if only is not None else "it has none")
    if full["resampling"] not in _DOWN_PADDING:
        raise _refusal("resampling", full["resampling"], f"it has {' and '.join(_DOWN_PADDING)}")
    if full["noise_embedding"] not in EMBEDDINGS:
        raise _refusal("noise_embedding", full["noise_embedding"], f"it has {' and '.join(EMBEDDINGS)}")
    if full["num_classes"] is not None and full["label_mode"] == "cross_attention":
        raise _refusal("label_mode", full["label_mode"], "it has add (and concat, around it)")
    if len(set(full["num_blocks"])) > 1:
        raise _refusal("num_blocks", list(full["num_blocks"]), "it has the same number at every level")
    for name, expected in (("stem_channels", widths[0]), ("embedding_features", widths[0])):
        if full[name] not in (None, expected):
            raise _refusal(name, full[name], f"it has {expected}, the first level's channels")
    if full["embedding_features"] is None and full["base_channels"] != widths[0]:
        raise _refusal("channel_mults", list(full["channel_mults"]), "it starts at 1")
    if full["base_channels"] % 2:
        raise _refusal("base_channels", full["base_channels"], "it needs an even number")
    kinds = {*full["attention"], full["mid_attention"]}
    if "linear" in kinds:
        raise _refusal("attention", "linear", "it has full and none")
    if full["decoder_attention"] != "all" and "full" in full["attention"]:
        raise _refusal("decoder_attention", full["decoder_attention"], "it has all")
    residual = full["resampling"] == "residual"
    if residual and list(full["resample_filter"]) != [1, 1]:
        raise _refusal("resample_filter", list(full["resample_filter"]), "it has [1, 1]")
    _check_groups(full)
    plain = "Resnet{}sampleBlock2D" if residual else "{}Block2D"
    kinds_of = ["Attn{}Block2D" if kind == "full" else plain for kind in full["attention"]]
    size = full["image_size"]
    labels = 0
    if full["num_classes"] is not None and full["label_mode"] == "concat":
        labels = full["label_channels"]
    return {
        "sample_size": _sample_size(size, patch),
        "in_channels": (full["in_channels"] + full["concat_channels"]) * patch**2 + labels,
        "out_channels": full["out_channels"] * patch**2,
        "down_block_types": [kind.format("Down") for kind in kinds_of],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds_of)],
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "block_out_channels": widths,
        "layers_per_block": full["num_blocks"][0],
        "add_attention": full["mid_attention"] == "full",
        "attention_head_dim": _head_dim(full),
        "norm_num_groups": full["groups"],
        "attn_norm_num_groups": full["groups"],
        "norm_eps": full["norm_eps"],
        "dropout": full["dropout"],
        "resnet_time_scale_shift": "scale_shift" if full["scale_shift"] else "default",
        "downsample_padding": _DOWN_PADDING[full["resampling"]],
        "time_embedding_dim": full["embedding_channels"] or 4 * full["base_channels"],
        "flip_sin_to_cos": EMBEDDINGS[full["noise_embedding"]][0],
        "freq_shift": EMBEDDINGS[full["noise_embedding"]][1],
        "num_class_embeds": None if full["num_classes"] is None or labels else full["num_classes"] + 1,
    }


def _sample_size(size: Any, patch: int) -> int | list[int] | None:
    if size is None:
        return None
    sides = [size, size] if isinstance(size, int) else list(size)
    height, width = (int(side) // patch for side in sides)
    return height if height == width else [height, width]


def _head_dim(full: Mapping[str, Any]) -> int | None:
    """``attention_head_dim``: one number for all levels, None for one head of all channels."""
    attended = {step.out_channels for part in layout_steps(full) for step in part if step.attention == "full"}
    heads, dim = full["heads"], full["head_dim"]
    if heads is not None and dim is not None and any(heads * dim != width for width in attended):
        raise _refusal("head_dim", dim, "its heads split a level's channels")
    if dim is not None:
        if any(width < dim for width in attended):
            raise _refusal("head_dim", dim, "a level that attends has fewer channels")
        return dim
    if heads in (None, 1):
        return None
    dims = {width // heads for width in attended}
    if len(dims) > 1:
        raise _refusal("heads", heads, "it has heads of one size, give head_dim in place of their number")
    return dims.pop() if dims else None


def _check_groups(full: Mapping[str, Any]) -> None:
    """The number of groups is the same in every norm of diffusers'."""
    blocks = [step for part in layout_steps(full) for step in part if step.kind == "block"]
    widths = {width for step in blocks for width in (step.in_channels, step.out_channels)}
    bad = [
        width for width in sorted(widths) if fit_groups(width, full["groups"], full["group_channels"]) != full["groups"]
    ]
    if bad:
        raise _refusal("groups", full["groups"], f"it has as many in every norm, and {bad[0]} channels do not allow it")


def _refusal(option: str, value: Any, told: str) -> OrnsteinError:
    return OrnsteinError(f"model.network.{option}={value} has no counterpart in diffusers' UNet2DModel: {told}.")


def arguments_from_config(config: Mapping[str, Any], *, classes: int | None) -> dict[str, Any]:
    """Our constructor's arguments for a ``UNet2DModel``'s config and a number of classes.

    Raises:
        OrnsteinError: it describes a network that ours is not.
    """
    for key, (only, default) in _THEIRS.items():
        if config.get(key, default) != only:
            raise OrnsteinError(f"{key}={config.get(key)} of this UNet2DModel is none of ours, which has {only}.")
    kinds = {"DownBlock2D": "none", "AttnDownBlock2D": "full", "ResnetDownsampleBlock2D": "none"}
    downs = list(config["down_block_types"])
    mirrored = [name.replace("Down", "Up") for name in reversed(downs)]
    if any(name not in kinds for name in downs) or list(config["up_block_types"]) != mirrored:
        raise OrnsteinError(
            f"blocks {downs} and {list(config['up_block_types'])} of this UNet2DModel are none of ours, which has "
            "DownBlock2D, AttnDownBlock2D and ResnetDownsampleBlock2D, and the same going up."
        )
    resampling = _resampling_of(config, downs)
    spaced = (bool(config.get("flip_sin_to_cos", True)), config.get("freq_shift", 0))
    embeddings = {value: key for key, value in EMBEDDINGS.items()}
    if spaced not in embeddings:
        raise OrnsteinError(f"flip_sin_to_cos={spaced[0]} with freq_shift={spaced[1]} is none of our noise embeddings.")
    scale_shift = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    attends = config.get("add_attention", True) is not False
    groups = config.get("norm_num_groups", 32)
    mid_groups = config.get("attn_norm_num_groups") or (None if scale_shift else groups)
    if attends and mid_groups != groups:
        raise OrnsteinError(
            "the middle attention of this UNet2DModel has a norm unlike the others', which ours has not."
        )
    widths = [int(width) for width in config["block_out_channels"]]
    size = config.get("sample_size")
    return {
        "in_channels": config.get("in_channels", 3),
        "out_channels": config.get("out_channels", 3),
        "image_size": size if size is None or isinstance(size, int) else list(size),
        "num_classes": classes,
        "patch_size": 1,
        "base_channels": widths[0],
        "channel_mults": [width / widths[0] if width % widths[0] else width // widths[0] for width in widths],
        "num_blocks": [config.get("layers_per_block", 2)] * len(widths),
        "block": "resnet",
        "resampling": resampling,
        "attention": [kinds[name] for name in downs],
        "mid_attention": "full" if attends else "none",
        "head_dim": config.get("attention_head_dim", 8),
        "groups": groups,
        "norm_eps": config.get("norm_eps", 1e-5),
        "dropout": config.get("dropout", 0.0),
        "scale_shift": scale_shift,
        "noise_embedding": embeddings[spaced],
        "embedding_channels": config.get("time_embedding_dim") or 4 * widths[0],
    }


def _resampling_of(config: Mapping[str, Any], downs: list[str]) -> str:
    """Our ``resampling``: the same at every level that halves, on both ways."""
    typed = {config.get("downsample_type", "conv"), config.get("upsample_type", "conv")}
    attended = typed if any(name.startswith("Attn") for name in downs[:-1]) else set()
    plain = {"resnet" if name.startswith("Resnet") else "conv" for name in downs[:-1] if not name.startswith("Attn")}
    found = attended | plain or {"conv"}
    if len(found) > 1:
        raise OrnsteinError(f"this UNet2DModel resamples by {' and '.join(sorted(found))}; ours does one of them.")
    if found == {"resnet"}:
        return "residual"
    return "conv_end" if config.get("downsample_padding", 1) == 0 else "conv"
