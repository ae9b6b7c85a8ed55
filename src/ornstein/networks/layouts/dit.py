"""facebookresearch/DiT, willisma/SiT and hustvl/LightningDiT as a :class:`ornstein.networks.DiT`.

The three name their parts alike. Whose clock: DiT's noise condition is the integer step i = 0 .. 999, ours is
1000 t = i + 1; the shift is turned into the layer after the sinusoids, exactly (:func:`shift_noise`). SiT's and
LightningDiT's is a time from noise (0) to data (1), which takes an affine map (``noise_scale=-0.001, noise_offset=1``),
and their velocity points the other way: the last layer is negated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.networks.dit import DiT
from ornstein.networks.dit_blocks import perceptron_width
from ornstein.networks.dit_positions import rotary_table
from ornstein.networks.embeddings import sincos_positions
from ornstein.networks.layouts import Converted, listed, shift_noise

State = Mapping[str, Tensor]

# Heads cannot be read from shapes; these are the published sizes of DiT, SiT and LightningDiT.
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}
FAMILIES = ("auto", "dit", "sit")

_OFFICIAL = {
    "x_embedder.proj": "patches",
    "t_embedder.mlp.0": "embed.mlp.0",
    "t_embedder.mlp.2": "embed.mlp.2",
    "y_embedder.embedding_table": "embed.label",
    "final_layer.norm_final": "out_norm",
    "final_layer.adaLN_modulation.1": "out_modulation",
    "final_layer.linear": "out",
}
_OFFICIAL_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "qkv",
    "attn.q_norm": "q_norm",
    "attn.k_norm": "k_norm",
    "attn.proj": "out",
    "norm2": "norm2",
    "mlp.fc1": "mlp_in",
    "mlp.fc2": "mlp_out",
    "mlp.w12": "mlp_in",
    "mlp.w3": "mlp_out",
    "adaLN_modulation.1": "modulation",
}
# Parts that DiT and SiT lack.
_OF_LIGHTNING = (
    "blocks.0.norm1.weight",
    "blocks.0.mlp.w12.weight",
    "blocks.0.attn.q_norm.weight",
    "feat_rope.freqs_cos",
)
_TABLES = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")


def recognise(state: State, *, config: Mapping[str, Any] | None = None) -> bool:
    """Whether a state dict is laid out as DiT's."""
    around = ("x_embedder.proj", "t_embedder.mlp.0", "y_embedder.embedding_table", "final_layer.linear")
    return all(f"{name}.weight" in state for name in (*around, "blocks.0.attn.qkv", "blocks.0.adaLN_modulation.1"))


def convert(
    state: State,
    *,
    config: Mapping[str, Any] | None = None,
    heads: int | None = None,
    family: str = "auto",
) -> Converted:
    """The network of DiT, SiT or LightningDiT.

    Args:
        state: the model's weights.
        config: not needed.
        heads: attention heads; None: read from normed or rotated heads, or those of the published model of this width.
        family: ``dit`` (noise predicted from integer steps), ``sit`` (velocity of the linear path, as LightningDiT's),
            or ``auto``: sit where there is anything that DiT lacks, else dit. DiT and SiT look the same.

    Raises:
        OrnsteinError: weights are missing or of another shape, positions are not DiT's, or heads are not known.
    """
    if family not in FAMILIES:
        raise OrnsteinError(f"family is one of {', '.join(FAMILIES)}, got '{family}'.")
    lightning = any(key in state for key in _OF_LIGHTNING)
    velocity = family == "sit" or (family == "auto" and lightning)
    tables = {key: state[key] for key in _TABLES if key in state}
    weights = {key: value for key, value in state.items() if key not in tables}
    mapped, unmapped = renamed(weights, _OFFICIAL, "blocks", _OFFICIAL_BLOCK)
    arguments = read_arguments(mapped, heads=heads, cosines=tables.get("feat_rope.freqs_cos"))
    _check_tables(tables, arguments)
    if velocity:
        _reverse(mapped, arguments)
    else:
        mapped["embed.mlp.0.weight"] = shift_noise(mapped["embed.mlp.0.weight"], by=-1.0)
    note = (
        "" if lightning or family != "auto" else "DiT and SiT look the same: DiT is assumed, family=sit is the other."
    )
    return Converted(
        "ornstein.networks.DiT",
        arguments,
        checked(arguments, mapped),
        unmapped=tuple(unmapped),
        dropped=tuple(tables),
        suggest=_suggestions(arguments, velocity=velocity),
        note=note,
    )


def _reverse(mapped: dict[str, Tensor], arguments: dict[str, Any]) -> None:
    """Take time and velocity from data to noise; leave out the channels that their samplers ignore (learn_sigma)."""
    arguments |= {"noise_scale": -0.001, "noise_offset": 1.0}
    mapped["noise.values"] = torch.tensor([-0.001, 1.0, 0.0])
    channels, pixels = arguments["in_channels"], arguments["patch_size"] ** 2
    kept = channels if arguments["out_channels"] == 2 * channels else arguments["out_channels"]
    for key in ("out.weight", "out.bias"):
        by_channel = mapped[key].unflatten(0, (pixels, arguments["out_channels"]))
        mapped[key] = -by_channel[:, :kept].flatten(0, 1)
    arguments["out_channels"] = kept


def _suggestions(arguments: Mapping[str, Any], *, velocity: bool) -> tuple[str, ...]:
    if velocity:
        return "scheduler=flow", "objective=flow"
    if arguments["out_channels"] == 2 * arguments["in_channels"]:
        return "scheduler=linear", "objective=hybrid", "objective.last=gaussian"
    return "scheduler=linear", "objective=eps"


def renamed(
    state: State, names: Mapping[str, str], blocks: str, in_block: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under our names, and the keys that have none.

    Args:
        state: the weights under theirs.
        names: their module to ours, outside the blocks.
        blocks: their list of blocks.
        in_block: their module to ours, inside a block.
    """
    mapped: dict[str, Tensor] = {}
    unmapped: list[str] = []
    for key, value in state.items():
        module, _, part = key.rpartition(".")
        index, _, rest = module.removeprefix(f"{blocks}.").partition(".")
        if module.startswith(f"{blocks}."):
            name = f"blocks.{index}.{in_block[rest]}" if index.isdigit() and rest in in_block else None
        else:
            name = names.get(module)
        if name is None:
            unmapped.append(key)
        else:
            mapped[f"{name}.{part}"] = value
    return mapped, unmapped


def read_arguments(mapped: State, *, heads: int | None, cosines: Tensor | None = None) -> dict[str, Any]:
    """The constructor's arguments of weights under our names; ``cosines`` are a rotation's, (N, head_dim).

    Raises:
        OrnsteinError: weights are missing, or heads are not known.
    """
    needed = (
        "patches.weight",
        "out.weight",
        "blocks.0.qkv.weight",
        "blocks.0.mlp_in.weight",
        "blocks.0.mlp_out.weight",
    )
    missing = [key for key in needed if key not in mapped]
    if missing:
        raise OrnsteinError(f"These weights of a DiT are missing: {listed(missing)}.")
    hidden, channels, patch, _ = mapped["patches.weight"].shape
    if heads is None:
        head_norm = mapped.get("blocks.0.q_norm.weight")
        if head_norm is not None:
            heads = hidden // head_norm.shape[0]
        elif cosines is not None:
            heads = hidden // cosines.shape[-1]
        elif hidden in PUBLISHED_HEADS:
            heads = PUBLISHED_HEADS[hidden]
        else:
            raise OrnsteinError(
                f"The number of heads of a DiT {hidden} wide cannot be read from its weights: give heads."
            )
    qk_norm = None
    if "blocks.0.q_norm.weight" in mapped:
        qk_norm = "layer" if "blocks.0.q_norm.bias" in mapped else "rms"
    width = mapped["blocks.0.mlp_out.weight"].shape[1]
    mlp = "swiglu" if mapped["blocks.0.mlp_in.weight"].shape[0] == 2 * width else "gelu"
    label = mapped.get("embed.label.weight")
    return {
        "in_channels": channels,
        "out_channels": mapped["out.weight"].shape[0] // patch**2,
        "image_size": None,
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": 1 + max(int(key.split(".")[1]) for key in mapped if key.startswith("blocks.")),
        "heads": heads,
        "mlp_ratio": _mlp_ratio(hidden, width, mlp),
        "num_classes": None if label is None else label.shape[0] - 1,
        "positions": "sincos" if cosines is None else "sincos_rope",
        "norm": "rms" if "blocks.0.norm1.weight" in mapped else "layer",
        "qk_norm": qk_norm,
        "mlp": mlp,
        "noise_embedding": "sinusoidal",
        "noise_scale": 1.0,
        "noise_offset": 0.0,
    }


def _mlp_ratio(hidden: int, width: int, mlp: str) -> float:
    """The ratio that gives a perceptron of `width`; both conventions round down, so it lies just above."""
    whole = width if mlp == "gelu" else math.ceil(1.5 * width)
    for inner in (whole, whole + 1, whole + 2):
        ratio = inner / hidden
        if perceptron_width(hidden, ratio, mlp) == width:
            return ratio
    raise OrnsteinError(f"A perceptron of {width} channels in a DiT {hidden} wide follows no known convention.")


def _check_tables(tables: State, arguments: dict[str, Any]) -> None:
    """Compare stored positions, which ours makes anew, and read the image size from them."""
    if "pos_embed" not in tables:
        return
    stored = tables["pos_embed"]
    side = math.isqrt(stored.shape[-2])
    arguments["image_size"] = side * arguments["patch_size"]
    if side**2 != stored.shape[-2]:
        raise OrnsteinError(f"pos_embed holds {stored.shape[-2]} positions, which is no square image.")
    expected = {"pos_embed": sincos_positions(side, side, stored.shape[-1])}
    if "feat_rope.freqs_cos" in tables:
        cosines, sines = rotary_table(side, side, arguments["hidden_size"] // arguments["heads"])
        signs = torch.tensor([-1.0, 1.0]).repeat(sines.shape[-1] // 2)
        expected |= {"feat_rope.freqs_cos": cosines, "feat_rope.freqs_sin": sines * signs}
    for key, value in tables.items():
        given = value.detach().cpu().float().reshape(-1, value.shape[-1])
        # Theirs may be angles in float32, or weights kept in half precision.
        tolerance = 1e-4 if value.dtype in (torch.float32, torch.float64) else 1e-2
        if given.shape != expected[key].shape or (given - expected[key]).abs().max() > tolerance:
            raise OrnsteinError(
                f"{key} differs from the positions that a DiT makes for {side} x {side} patches: these weights were "
                "trained with other positions (a learned or rescaled table), which this layout cannot express."
            )


def checked(arguments: Mapping[str, Any], mapped: State) -> dict[str, Tensor]:
    """The weights, if a network of these arguments takes exactly them.

    Raises:
        OrnsteinError: some are missing, superfluous or of another shape; names them.
    """
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in DiT(**arguments).state_dict().items()}
    missing = [key for key in shapes if key not in mapped]
    if missing:
        raise OrnsteinError(f"These weights of a DiT are missing: {listed(missing)}.")
    unknown = [key for key in mapped if key not in shapes]
    if unknown:
        raise OrnsteinError(f"These weights have no place in ornstein's DiT: {listed(unknown)}.")
    wrong = [
        f"{key} {tuple(mapped[key].shape)} for {tuple(shapes[key])}"
        for key in shapes
        if mapped[key].shape != shapes[key]
    ]
    if wrong:
        raise OrnsteinError(f"These weights have another shape than in ornstein's DiT: {listed(wrong)}.")
    return {key: mapped[key].contiguous() for key in shapes}
