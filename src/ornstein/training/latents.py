"""A batch's clean data in the space being diffused: encoded now, or read from latents that were encoded before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ornstein.codecs import Codec
from ornstein.data.latents import check_codec, take_scale

if TYPE_CHECKING:
    from ornstein.training.module import DiffusionModule


def batch_images(batch: Mapping[str, Any]) -> int:
    """How many images a batch stands for, whether it holds them or their latents."""
    return int(batch["latent" if "latent" in batch else "image"].shape[0])


def batch_device(batch: Mapping[str, Any]) -> torch.device:
    """Where a batch's images or latents are."""
    device: torch.device = batch["latent" if "latent" in batch else "image"].device
    return device


def prepare_latents(module: DiffusionModule, data: Any) -> None:
    """Opens the latents that a data module is to serve in the place of images, if any; the images come along where the
    conditioner looks at them. A codec whose scale was to be measured takes that of the latents.

    Raises:
        OrnsteinError: latents of another codec, or without the mirrored views that training draws from.
    """
    if getattr(data, "latents", None) is None:
        return
    recipe = data.open_latents()
    check_codec(recipe, module.codec, folder=data.latents, flip=module.flip, command=data.latents_command)
    data.latents_with_images = "image" in module.conditioner.needs
    take_scale(module.codec, recipe)


def clean_latents(
    batch: Mapping[str, Any], codec: Codec, *, flip: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """x0 of a batch, (B, codec.channels, \\*codec.size) float32, without gradient.

    Images are encoded. Latents are taken as they are, or drawn from their moments where the codec draws: from the same
    place of the same generator, so that both ways give the same x0 up to rounding.

    Args:
        batch: ``image`` uint8 (B, C, H, W), or ``latent`` (B, c, h, w) with ``latent_std``, ``latent_flipped`` and
            ``latent_flipped_std`` where there are such.
        codec: what encodes.
        flip: bool (B,), which images to mirror; their latents are those of mirrored images, not mirrored latents.
        generator: of what a codec draws, on the batch's device.
    """
    where = None if flip is None else flip.reshape(-1, 1, 1, 1)
    with torch.no_grad():
        if "latent" not in batch:
            x = batch["image"].to(torch.float32).div_(127.5).sub_(1.0)
            return codec.encode(x if where is None else torch.where(where, x.flip(-1), x), generator=generator)
        mean = _view(batch, where, "")
        if not codec.stochastic or "latent_std" not in batch:
            return mean
        eps = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + _view(batch, where, "_std") * eps


def _view(batch: Mapping[str, Any], flip: Tensor | None, end: str) -> Tensor:
    """A plane of each image's view, mirrored or not."""
    plain: Tensor = batch[f"latent{end}"].to(torch.float32)
    return plain if flip is None else torch.where(flip, batch[f"latent_flipped{end}"].to(torch.float32), plain)
