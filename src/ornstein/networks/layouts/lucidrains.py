"""denoising-diffusion-pytorch's ``Unet``, alone or in its ``GaussianDiffusion``, as a :class:`LucidrainsUNet`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError
from ornstein.networks.layouts import Converted, Source, shift_noise

_BLOCK = {"mlp.1": "condition", "block1.proj": "conv1", "block2.proj": "conv2"}


def recognise(state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None) -> bool:
    """Whether a state dict is such a U-Net's, or that of the diffusion around it."""
    names = {name.removeprefix("model.") for name in state}
    return {"init_conv.weight", "time_mlp.1.weight", "final_res_block.block1.norm.g", "mid_attn.mem_kv"} <= names


def convert(state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None) -> Converted:
    """The network; where the diffusion around it is there too, its schedule and objective from its buffers.

    Raises:
        OrnsteinError: a part that this layout always has is missing, or a self-conditioned network.
    """
    inner = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    around = {name: value for name, value in state.items() if not name.startswith("model.")} if inner else {}
    source = Source(dict(inner or state))
    levels = 1 + max(int(match[1]) for name in source.left if (match := re.match(r"downs\.(\d+)\.", name)))
    arguments = _arguments(source.left, levels)
    steps = len(around["betas"]) if "betas" in around else 1000
    ours = {
        **source.layer("init_conv", "stem"),
        **source.layer("time_mlp.1", "noise.1"),
        **source.layer("time_mlp.3", "noise.3"),
    }
    for i in range(levels):
        for side, ours_side in (("downs", "down"), ("ups", "up")):
            ours |= _block(source, f"{side}.{i}.0", f"{ours_side}.{i}.block1")
            ours |= _block(source, f"{side}.{i}.1", f"{ours_side}.{i}.block2")
            ours |= _attention(source, f"{side}.{i}.2", f"{ours_side}.{i}.attention")
            last = i == levels - 1
            ours |= source.layer(
                f"{side}.{i}.3" + ("" if last else ".1"), f"{ours_side}.{i}.resample" + ("" if last else ".conv")
            )
    ours |= _block(source, "mid_block1", "mid1")
    ours |= _attention(source, "mid_attn", "mid_attention")
    ours |= _block(source, "mid_block2", "mid2")
    ours |= _block(source, "final_res_block", "out_block")
    ours |= source.layer("final_conv", "out")
    # The sines come first, and the last frequency is exactly 1/10000.
    sines, cosines = ours["noise.1.weight"].chunk(2, dim=1)
    half = cosines.shape[1]
    frequencies = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / (half - 1))
    turned = shift_noise(torch.cat([cosines, sines], dim=1), by=-1.0, frequencies=frequencies)
    ours["noise.1.weight"] = torch.cat([turned[:, half:], turned[:, :half]], dim=1)
    suggest, note = _diffusion(around)
    return Converted(
        "ornstein.networks.LucidrainsUNet",
        {**arguments, "num_timesteps": steps},
        ours,
        unmapped=tuple(sorted(source.left)),
        dropped=tuple(sorted(around)),
        suggest=suggest,
        note=note,
    )


def _arguments(state: Mapping[str, Tensor], levels: int) -> dict[str, Any]:
    stem, in_channels = state["init_conv.weight"].shape[:2]
    out_channels = state["final_conv.weight"].shape[0]
    if in_channels == 2 * out_channels:
        raise OrnsteinError(
            f"the network takes {in_channels} channels and gives {out_channels}: it is conditioned on its own last "
            "prediction (self_condition), which no network of this package does."
        )
    base = state["time_mlp.1.weight"].shape[1]
    ends = [state[f"downs.{i}.3{'' if i == levels - 1 else '.1'}.weight"].shape[0] for i in range(levels)]
    _, heads, memory, head_dim = state["mid_attn.mem_kv"].shape
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "base_channels": base,
        "stem_channels": stem,
        "channel_mults": [end // base for end in ends],
        "attention": ["linear" if f"downs.{i}.2.to_out.0.weight" in state else "full" for i in range(levels)],
        "heads": heads,
        "head_dim": head_dim,
        "memory": memory,
    }


def _block(source: Source, theirs: str, ours: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, our_name in _BLOCK.items():
        state |= source.layer(f"{theirs}.{name}", f"{ours}.{our_name}")
    for norm in (1, 2):
        state[f"{ours}.norm{norm}.gain"] = source.take(f"{theirs}.block{norm}.norm.g").flatten()
    if f"{theirs}.res_conv.weight" in source.left:
        state |= source.layer(f"{theirs}.res_conv", f"{ours}.shortcut")
    return state


def _attention(source: Source, theirs: str, ours: str) -> dict[str, Tensor]:
    linear = f"{theirs}.to_out.0.weight" in source.left
    memory = source.take(f"{theirs}.mem_kv")
    state = {
        f"{ours}.memory": memory.mT.contiguous() if linear else memory,
        f"{ours}.norm.gain": source.take(f"{theirs}.norm.g").flatten(),
        **source.layer(f"{theirs}.to_qkv", f"{ours}.qkv"),
        **source.layer(f"{theirs}.to_out" + (".0" if linear else ""), f"{ours}.out"),
    }
    if linear:
        state[f"{ours}.out_norm.gain"] = source.take(f"{theirs}.to_out.1.g").flatten()
    return state


def _diffusion(around: Mapping[str, Tensor]) -> tuple[tuple[str, ...], str]:
    """Schedule and objective that the buffers of a ``GaussianDiffusion`` tell of; its own defaults without them."""
    usual = ("scheduler=snr_sigmoid", "objective=v", "objective/time=discrete_uniform")
    if "betas" not in around:
        return usual, (
            "the file does not say how the network was trained: assumed are that library's defaults, v on the sigmoid "
            "schedule."
        )
    betas = around["betas"].double()
    steps = len(betas)
    alpha_bar = (1 - betas).cumprod(0)
    objective, told = "v", ""
    if "loss_weight" in around:
        snr = alpha_bar / (1 - alpha_bar)
        candidates = {"eps": torch.ones_like(snr), "x0": snr, "v": snr / (snr + 1)}
        weight = around["loss_weight"].double()
        found = [name for name, value in candidates.items() if torch.allclose(weight, value, rtol=1e-2)]
        objective = found[0] if found else "v"
        told = "" if found else "its loss is weighted as none of its objectives alone: v is assumed. "
    ramp = 1000 / steps * torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    curve = ((grid + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
    cosine = (1 - curve[1:] / curve[:-1]).clamp(0, 0.999)
    scheduler: tuple[str, ...]
    if torch.allclose(betas, ramp, rtol=1e-3):
        scheduler = (
            "scheduler=linear",
            f"scheduler.num_timesteps={steps}",
            f"scheduler.beta_start={0.1 / steps}",
            f"scheduler.beta_end={20 / steps}",
        )
    elif torch.allclose(betas, cosine, rtol=1e-3):
        scheduler = ("scheduler=cosine", f"scheduler.num_timesteps={steps}")
    else:
        scheduler = ("scheduler=snr_sigmoid",)
        told += "" if _is_sigmoid(alpha_bar) else "its table of betas is unknown: snr_sigmoid is assumed."
    return (*scheduler, f"objective={objective}", "objective/time=discrete_uniform"), told.strip()


def _is_sigmoid(alpha_bar: Tensor) -> bool:
    grid = torch.linspace(-3, 3, len(alpha_bar) + 1, dtype=torch.float64)
    curve = (torch.tensor(3.0).sigmoid() - grid.sigmoid()) / (
        torch.tensor(3.0).sigmoid() - torch.tensor(-3.0).sigmoid()
    )
    return torch.allclose(alpha_bar[:-1], curve[1:-1], atol=1e-3)
