"""Checkpoints of other libraries as ours: pure maps from their state dicts to a network of ours and its state dict.

A layout is a module with two functions. ``recognise(state, *, config=None)`` says whether a state dict is laid out its
way, by names and shapes alone; at most one layout says so. ``convert(state, *, config=None, **facts)`` gives a
:class:`Converted`; ``facts`` are what the file does not say, each with the source's usual value as its default.
``config`` is the ``config.json`` of a diffusers folder, None elsewhere.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError

# name -> whose checkpoints these are
LAYOUTS = {
    "adm": "openai/guided-diffusion",
    "edm": "NVlabs/edm",
    "dit": "facebookresearch/DiT, willisma/SiT, hustvl/LightningDiT",
    "diffusers_dit": "diffusers' DiTTransformer2DModel",
    "diffusers_unet": "diffusers' UNet2DModel",
    "kl": "diffusers' AutoencoderKL",
    "lucidrains": "lucidrains/denoising-diffusion-pytorch",
}
SHOWN = 10  # keys that a sentence names


@dataclass(frozen=True)
class Converted:
    """A checkpoint of another library as one of ours.

    Attributes:
        target: dotted path of our class.
        arguments: its constructor's keyword arguments, plain JSON values.
        state: its state dict.
        unmapped: names in the source that have no place in it.
        dropped: names in the source left out on purpose, because no output depends on them.
        suggest: what fits the network beside it, as overrides of ``train.py``: ``scheduler=linear`` and the like.
        note: what was assumed because the file does not say it; one sentence.
    """

    target: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]
    unmapped: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    suggest: tuple[str, ...] = ()
    note: str = ""


@dataclass
class Source:
    """A state dict that is emptied while it is mapped, so that what found no place is left over at the end.

    Attributes:
        left: what has not been taken yet.
    """

    left: dict[str, Tensor]
    dropped: list[str] = field(default_factory=list)

    def take(self, name: str) -> Tensor:
        """The tensor ``name``.

        Raises:
            OrnsteinError: there is none.
        """
        if name not in self.left:
            raise OrnsteinError(f"the checkpoint looks like one of this layout but holds no {name}: is it cut?")
        return self.left.pop(name)

    def layer(self, name: str, ours: str) -> dict[str, Tensor]:
        """Weight and, where there is one, bias of a layer, under its name in our network."""
        leaves = ["weight", "bias"] if f"{name}.bias" in self.left else ["weight"]
        return {f"{ours}.{leaf}": self.take(f"{name}.{leaf}") for leaf in leaves}

    def drop(self, *names: str) -> None:
        """Leaves out those of ``names`` that are there."""
        for name in names:
            if self.left.pop(name, None) is not None:
                self.dropped.append(name)


def layout_module(name: str) -> ModuleType:
    """The module of the layout ``name``.

    Raises:
        OrnsteinError: there is none; names those that there are.
    """
    if name not in LAYOUTS:
        raise OrnsteinError(f"layout '{name}' is unknown: choose auto, {', '.join(LAYOUTS)}.")
    return import_module(f"ornstein.networks.layouts.{name}")


def find_layout(state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None) -> str | None:
    """The name of the layout that recognises a state dict, None if none does."""
    return next((name for name in LAYOUTS if layout_module(name).recognise(state, config=config)), None)


def convert(
    state: Mapping[str, Tensor], *, layout: str = "auto", config: Mapping[str, Any] | None = None, **facts: Any
) -> Converted:
    """A state dict of another library as a network of ours.

    Args:
        state: its tensors; training wrappers (``ema``, ``module.``) are taken off by the reader before.
        layout: ``auto`` or the name of one.
        config: the folder's ``config.json``, where it has one.
        facts: what the file does not say, such as ``head_dim``; each layout has its own.

    Raises:
        OrnsteinError: no layout recognises it, or a fact that the layout does not know.
    """
    name = find_layout(state, config=config) if layout == "auto" else layout
    if name is None:
        raise OrnsteinError(
            f"none of the layouts {', '.join(LAYOUTS)} fits; it holds {listed(sorted(state))}: is it a denoising "
            "network of one of these libraries? Name one with --layout to see what does not fit."
        )
    module = layout_module(name)
    known = {key for key in inspect.signature(module.convert).parameters if key not in ("state", "config")}
    for fact in facts:
        if fact not in known:
            raise OrnsteinError(f"layout {name} takes no fact {fact}; it takes {', '.join(sorted(known)) or 'none'}.")
    return module.convert(state, config=config, **facts)


def listed(names: list[str] | tuple[str, ...]) -> str:
    """Up to ten names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def shift_noise(weight: Tensor, *, by: float, frequencies: Tensor | None = None) -> Tensor:
    r"""The linear layer after a sinusoidal embedding, made to see the noise condition ``c + by`` where it is given c.

    .. math:: \cos((c + b) f) = \cos cf \cos bf - \sin cf \sin bf, \qquad
              \sin((c + b) f) = \sin cf \cos bf + \cos cf \sin bf

    so that the shift is a rotation of each pair of columns, exact but for rounding. Other libraries count DDPM's steps
    from 0 and our condition 1000 t counts them from 1, t = (i + 1)/T: a network that comes in is shifted by -1, one
    that goes out by +1.

    Args:
        weight: (out, dim), columns in the order of :func:`ornstein.networks.embeddings.sinusoidal_embedding`, all
            cosines before all sines.
        by: the shift, in units of the condition.
        frequencies: (dim / 2,); those of ``sinusoidal_embedding`` unless given.

    Returns:
        (out, dim), of the dtype of ``weight``.
    """
    half = weight.shape[1] // 2
    if frequencies is None:
        frequencies = torch.exp(-math.log(10_000.0) / half * torch.arange(half, dtype=torch.float64))
    angles = by * frequencies.double().to(weight.device)
    cos, sin = weight.double()[:, :half], weight.double()[:, half : 2 * half]
    turned = [cos * angles.cos() + sin * angles.sin(), sin * angles.cos() - cos * angles.sin()]
    # An odd embedding ends in a zero, whose column stays.
    return torch.cat([*turned, weight.double()[:, 2 * half :]], dim=1).to(weight.dtype)
