"""Conditioning on an image that joins the network's input as further channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ornstein.conditioning.conditioner import Conditioner, checked_dropout, drop, needed
from ornstein.conditioning.masks import KINDS, NUMBERS, hidden
from ornstein.diffusion.noise import NoiseSource, derive_seed
from ornstein.errors import OrnsteinError

SOURCES = ("low_resolution", "mask", "grey", "condition")
_LUMA = (0.299, 0.587, 0.114)


def image_channels(source: str, channels: int, condition_channels: int | None) -> int:
    """How many channels a source gives of images with ``channels``, and of conditions with ``condition_channels``.

    Raises:
        OrnsteinError: an unknown source, or ``condition`` of data that have none.
    """
    if source not in SOURCES:
        raise OrnsteinError(f"conditioner.source={source} is unknown: choose {', '.join(SOURCES)}.")
    if source == "condition" and condition_channels is None:
        raise OrnsteinError(
            "conditioner.source=condition needs data that carry a condition: add data.condition_root=FOLDER to "
            "data=image_folder, or choose conditioner.source=low_resolution, mask or grey."
        )
    return {
        "low_resolution": channels,
        "mask": channels + 1,
        "grey": 1,
        "condition": condition_channels or 0,
    }[source]


class Image(Conditioner):
    """An image beside the noisy one: its low resolution, what a mask leaves of it, its grey values, or a map apart.

    Values are in [-1, 1]; with ``source=mask`` hidden pixels are 0 and a last channel is 1 where they are hidden. Made
    at the data's resolution, then brought to that of what is diffused by area averages, which matters for latents
    alone: a network of latents sees its condition at the latents' resolution. In training all of it becomes 0, the null
    form, with probability ``dropout``; at 0 it is never dropped, and guidance keeps it.
    Source: Saharia et al. 2021 (arXiv 2104.07636), section 2, for low resolution by concatenation; Rombach et al. 2022
    (arXiv 2112.10752), section 4.5, for masks.

    Args:
        source: ``low_resolution`` (area averages over ``factor``, enlarged again bilinearly), ``mask``, ``grey``, or
            ``condition``: what the data carry beside their images (depth maps, edges).
        channels: of the images.
        size: of what is diffused, a side or (height, width).
        image_size: of the images; None where it is not known yet.
        concat_channels: what the network is told, checked against the source; None is not checked.
        condition_channels: of the data's conditions, None where they have none.
        factor: of low_resolution, at least 2.
        mask: ``half``, ``box``, ``free_form`` or ``mixed``. In training drawn anew for each image; in sampling a
            function of (seed, sample number) alone.
        dropout: probability in [0, 1] that a training image's condition is dropped.
        num_classes: None: there are no classes; for the config, from which networks read it.

    Raises:
        OrnsteinError: an unknown source or mask, or a number that does not fit.
    """

    def __init__(
        self,
        source: str = "low_resolution",
        *,
        channels: int,
        size: int | Sequence[int],
        image_size: int | None = None,
        concat_channels: int | None = None,
        condition_channels: int | None = None,
        factor: int = 4,
        mask: str = "mixed",
        dropout: float = 0.1,
        num_classes: None = None,
    ) -> None:
        super().__init__()
        if num_classes is not None:
            raise OrnsteinError(
                f"conditioner=image takes no num_classes but got {num_classes}; choose conditioner=class_image to "
                "condition on both."
            )
        self.concat_channels = image_channels(source, channels, condition_channels)
        if concat_channels is not None and concat_channels != self.concat_channels:
            raise OrnsteinError(
                f"conditioner.concat_channels={concat_channels} and conditioner.source={source} gives "
                f"{self.concat_channels}: leave conditioner.concat_channels as it is."
            )
        if source == "grey" and channels == 1:
            raise OrnsteinError(
                "conditioner.source=grey of images that are grey themselves (data.channels=1) gives all of them away: "
                "choose data in colour, or conditioner.source=low_resolution or mask."
            )
        if mask not in (*KINDS, "mixed"):
            raise OrnsteinError(f"conditioner.mask={mask} is unknown: choose {', '.join(KINDS)} or mixed.")
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
            raise OrnsteinError(f"conditioner.factor={factor} must be a whole number of at least 2.")
        if source == "low_resolution" and image_size is not None and image_size % factor:
            raise OrnsteinError(
                f"conditioner.factor={factor} does not divide data.image_size={image_size}: choose a factor that does."
            )
        self.source, self.channels, self.factor, self.mask = source, channels, factor, mask
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.image_size = image_size
        self.dropout = checked_dropout(dropout)
        self.has_null = self.dropout > 0
        self.needs = ("condition",) if source == "condition" else ("image",)

    def training_cond(self, batch: Mapping[str, Any], *, generator: torch.Generator | None) -> dict[str, Tensor]:
        """``{"concat": float32 (B, concat_channels, *size)}`` of ``batch["image"]`` or ``batch["condition"]``.

        Raises: OrnsteinError if the batch lacks it.
        """
        image = self._image(batch)
        u = None
        if self.source == "mask":
            u = torch.rand(len(image), NUMBERS, generator=generator, device=image.device)
        cond = self._made(image, u)
        if not self.has_null:
            return cond
        return drop(cond, {name: torch.zeros_like(value) for name, value in cond.items()}, self.dropout, generator)

    def cond(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same, none dropped; masks by ``given["index"]`` and ``given["seed"]`` (0 without).

        Raises: OrnsteinError if there is no image, or no number of the sample for its mask.
        """
        image = self._image(given)
        u = None
        if self.source == "mask":
            index = needed(given, "index", option="conditioner.source=mask", way_out="give the samples' numbers")
            source = NoiseSource(derive_seed(int(given.get("seed", 0)), "mask"))
            normal = source.noise(index.to(image.device), 0, shape=(NUMBERS,))
            u = (0.5 + 0.5 * torch.erf(normal / math.sqrt(2))).clamp(0, 1 - 1e-6)
        return self._made(image, u)

    def null_form(self, batch_size: int, device: torch.device | str) -> dict[str, Tensor]:
        """Zeros."""
        return {"concat": torch.zeros(batch_size, self.concat_channels, *self.size, device=device)}

    def pictures(self, cond: Mapping[str, Tensor]) -> Tensor | None:
        """The condition in grey or colour, without the mask's own channel."""
        shown = cond["concat"]
        shown = shown[:, : self.channels] if self.source == "mask" else shown
        shown = shown[:, :3] if shown.shape[1] >= 3 else shown[:, :1]
        return shown.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"source={self.source}, concat_channels={self.concat_channels}, dropout={self.dropout}"

    def _image(self, given: Mapping[str, Any]) -> Tensor:
        """Float32 in [-1, 1]."""
        (key,) = self.needs
        way_out = (
            "use data.condition_root=FOLDER with data=image_folder" if key == "condition" else "use data of images"
        )
        image = needed(given, key, option=f"conditioner.source={self.source}", way_out=way_out)
        expected = self.concat_channels if key == "condition" else self.channels
        if image.ndim != 4 or image.shape[1] != expected:
            raise OrnsteinError(
                f"conditioner.source={self.source} takes {key}s with {expected} channels, not {tuple(image.shape)}: "
                f"check {'data.condition_channels' if key == 'condition' else 'data.channels'}."
            )
        return image.to(torch.float32).div(127.5).sub(1.0)

    def _made(self, image: Tensor, u: Tensor | None) -> dict[str, Tensor]:
        if self.source == "low_resolution":
            height, width = image.shape[-2:]
            small = functional.interpolate(image, size=(height // self.factor, width // self.factor), mode="area")
            image = functional.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
        elif self.source == "grey":
            image = torch.einsum("bchw,c->bhw", image, image.new_tensor(_LUMA)).unsqueeze(1)
        elif u is not None:
            mask = hidden(u, (image.shape[-2], image.shape[-1]), kind=self.mask)
            image = torch.cat([image * (1 - mask), mask], dim=1)
        size = self._diffused(image)
        if tuple(image.shape[-2:]) != size:
            image = functional.interpolate(image, size=size, mode="area")
        return {"concat": image}

    def _diffused(self, image: Tensor) -> tuple[int, int]:
        """Sides of what is diffused of an image: ``size``, or of one of another shape than ``image_size`` squares as
        many times smaller.
        """
        height, width = image.shape[-2:]
        if self.image_size is None or height == width == self.image_size:
            return self.size
        return height * self.size[0] // self.image_size, width * self.size[1] // self.image_size
