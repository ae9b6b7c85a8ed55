"""Running a codec over a data set's images for the latents that are kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ornstein.codecs import Codec
from ornstein.data.base import ImageDataset
from ornstein.data.latents import Recipe
from ornstein.diffusion.noise import NoiseSource, derive_seed
from ornstein.errors import OrnsteinError

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def encode_images(codec: Codec, images: Tensor, index: Tensor, *, recipe: Recipe, planes: tuple[str, ...]) -> Tensor:
    """The planes of a batch, (B, planes, C, h, w) float32, on the images' device.

    Args:
        codec: on the images' device.
        images: uint8 (B, C, H, W).
        index: int64 (B,), the images' numbers: a draw depends on (seed, number, view) alone.
        recipe: what to store, and in what precision the codec runs.
        planes: their names, of :meth:`Recipe.planes`.
    """
    x = images.to(torch.float32).div_(127.5).sub_(1.0)
    found: dict[str, Tensor] = {}
    reduced = PRECISIONS[recipe.precision]
    with torch.autocast(x.device.type, dtype=reduced) if reduced is not None else nullcontext():
        for view, name in enumerate(plane for plane in planes if not plane.endswith("_std")):
            mean, std = _moments(codec, x.flip(-1) if name == "latent_flipped" else x, stored=recipe.store)
            if recipe.store == "sample":
                noise = NoiseSource(derive_seed(recipe.seed, "latents")).noise(index, view, shape=recipe.shape)
                mean = mean.float() + std.float() * noise
            found |= {name: mean.float(), f"{name}_std": std.float()}
    return torch.stack([found[plane] for plane in planes], dim=1)


def _moments(codec: Codec, x: Tensor, *, stored: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of z: of a codec that does not draw, what it gives, and zero."""
    if stored == "mean":
        z = codec.encode(x)
        return z, torch.zeros_like(z)
    # In the order of `encode`, so that what is drawn from these is what it draws, to the bit.
    posterior: Any = codec.posterior(x)  # type: ignore[operator]
    return (posterior.mean - codec.shift) * codec.scale, posterior.std * codec.scale


@torch.no_grad()
def fill(
    array: np.ndarray,
    codec: Codec,
    images: ImageDataset,
    rows: range,
    *,
    recipe: Recipe,
    device: torch.device,
    batch_size: int = 256,
    num_workers: int = 0,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Encodes images ``rows`` of a split into ``array`` (len(rows), planes, C, h, w), batch by batch.

    Args:
        array: a memory map, in the dtype to keep.
        codec: on ``device``, in eval mode.
        images: the split.
        rows: consecutive.
        recipe: of the latents.
        device: where the codec runs.
        batch_size: images at once; changes nothing but rounding.
        num_workers: processes that read images ahead; worth it where they are decoded as they are read.
        advance: called with the number of images after each batch.

    Raises:
        OrnsteinError: latents that are not finite, or too large for the dtype.
    """
    planes = recipe.planes(images.split)
    loader = DataLoader(
        images,
        batch_size=None,
        sampler=[np.arange(start, min(start + batch_size, rows.stop)) for start in range(*_ends(rows), batch_size)],
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # making an iterator must not move the global one
    )
    done = 0
    for batch in loader:
        found = encode_images(
            codec,
            batch["image"].to(device, non_blocking=True),
            batch["index"].to(device, non_blocking=True),
            recipe=recipe,
            planes=planes,
        )
        kept = found.to(getattr(torch, recipe.dtype)).cpu().numpy()
        if not np.isfinite(kept).all():
            raise OrnsteinError(_not_finite(found, kept, recipe, first=rows.start + done, split=images.split))
        array[done : done + len(kept)] = kept
        done += len(kept)
        if advance is not None:
            advance(len(kept))


def _not_finite(found: Tensor, kept: np.ndarray, recipe: Recipe, *, first: int, split: str) -> str:
    row = int(np.flatnonzero(~np.isfinite(kept).reshape(len(kept), -1).all(axis=1))[0])
    name = f"{split} image {first + row}"
    if bool(found.isfinite().all()):
        return f"the latent of {name} reaches {float(found.abs().max()):,.0f}, beyond dtype=float16: set dtype=float32."
    cure = "set precision=float32 or bfloat16" if recipe.precision == "float16" else "look at the codec's weights"
    return f"the codec gives no finite latent for {name}: {cure}."


def _ends(rows: range) -> tuple[int, int]:
    return rows.start, rows.stop


def _as_it_is(batch: Any) -> Any:
    """The data set has made the batch already."""
    return batch
