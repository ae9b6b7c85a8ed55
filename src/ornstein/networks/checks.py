"""Size checks whose one sentence says what does not fit and what would."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ornstein.errors import OrnsteinError


def image_size_pair(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return `(height, width)` of an integer (square), a pair, or None (any size)."""
    if image_size is None:
        return None
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return int(height), int(width)


def auto_patch_size(image_size: tuple[int, int] | None, *, grid: int) -> int:
    """Return the smallest power of two that leaves at most `grid` patches on the longer side.

    Raises:
        OrnsteinError: there is no image size to choose from.
    """
    if image_size is None:
        raise OrnsteinError("patch_size null is chosen from the image size: give image_size as well.")
    patch_size = 1
    while max(image_size) > grid * patch_size:
        patch_size *= 2
    return patch_size


def check_divisible(height: int, width: int, factor: int, *, why: str) -> None:
    """Refuse images whose sides are not multiples of `factor`.

    Raises:
        OrnsteinError: a side does not divide; the sentence names size, factor, cause and the nearest fit.
    """
    if height % factor or width % factor:
        fit = " x ".join(str(-(-side // factor) * factor) for side in (height, width))
        raise OrnsteinError(
            f"Images of {height} x {width} do not divide by {factor}, which {why} needs: "
            f"resize them to {fit}, or use a smaller patch_size or fewer levels."
        )


def side_factor(network: nn.Module) -> int | None:
    """What the sides of a network's images must be multiples of; None where it does not say.

    `factor` of U-Nets (how far they shrink), `patch_size` of transformers; of experts that of each.
    """
    experts = getattr(network, "experts", None)
    if experts is not None and len(experts):
        return side_factor(experts[0])
    for name in ("factor", "patch_size"):
        value = getattr(network, name, None)
        if isinstance(value, int):
            return value
    return None


def check_heads(width: int, heads: int, *, name: str = "hidden_size") -> None:
    """Refuse a width that does not split evenly into attention heads (OrnsteinError)."""
    if heads < 1 or width % heads:
        raise OrnsteinError(f"{name} {width} does not split into {heads} attention heads: choose a divisor.")


def check_pooled(pooled: Tensor | None, dim: int | None) -> None:
    """Refuse a pooled caption vector `(B, dim)` that is missing, superfluous or of another size (dim None: takes none).

    Raises:
        OrnsteinError: says which.
    """
    _check_given(pooled, dim, what="a pooled caption vector", option="pooled_dim", axes=2)


def check_text(text: Tensor | None, mask: Tensor | None, dim: int | None) -> None:
    """Refuse caption tokens `(B, L, dim)` and their mask `(B, L)` that do not fit (dim None: takes none).

    Raises:
        OrnsteinError: says what is missing, superfluous or of another shape.
    """
    _check_given(text, dim, what="caption tokens", option="text_dim", axes=3)
    if mask is not None and (text is None or mask.shape != text.shape[:2]):
        raise OrnsteinError(
            f"text_mask is (B, L), one flag a caption token, got {tuple(mask.shape)} for tokens of shape "
            f"{None if text is None else tuple(text.shape)}."
        )


def join_concat(x: Tensor, concat: Tensor | None, channels: int) -> Tensor:
    """Return `x (B, C, H, W)` with the conditioning image `concat (B, channels, H, W)` as further channels.

    Raises:
        OrnsteinError: the image is missing, superfluous or of another shape.
    """
    if channels == 0:
        if concat is not None:
            raise OrnsteinError(
                "This network takes no conditioning image (concat_channels is 0): leave concat out, or choose "
                "conditioner=image."
            )
        return x
    expected = (x.shape[0], channels, *x.shape[2:])
    if concat is None or tuple(concat.shape) != expected:
        raise OrnsteinError(
            f"This network takes a conditioning image of shape {expected} beside every sample, got "
            f"{None if concat is None else tuple(concat.shape)}."
        )
    return torch.cat([x, concat.to(x.dtype)], dim=1)


def _check_given(value: Tensor | None, dim: int | None, *, what: str, option: str, axes: int) -> None:
    if dim is None:
        if value is not None:
            raise OrnsteinError(
                f"This network takes no captions ({option} is null) but got {what}: leave it out, or choose a model "
                "with text conditioning, such as model=text_unet."
            )
        return
    if value is None:
        raise OrnsteinError(
            f"This network is conditioned on captions and needs {what} for every sample ({option}={dim})."
        )
    if value.ndim != axes or value.shape[-1] != dim:
        raise OrnsteinError(
            f"{option}={dim} asks for {what} of shape ({'B, ' if axes == 2 else 'B, L, '}{dim}), got "
            f"{tuple(value.shape)}: is the text encoder another one than the network was made for?"
        )
