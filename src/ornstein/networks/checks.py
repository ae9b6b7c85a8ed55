"""Size checks whose one sentence says what does not fit and what would."""

from __future__ import annotations

from collections.abc import Sequence

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


def check_heads(width: int, heads: int, *, name: str = "hidden_size") -> None:
    """Refuse a width that does not split evenly into attention heads (OrnsteinError)."""
    if heads < 1 or width % heads:
        raise OrnsteinError(f"{name} {width} does not split into {heads} attention heads: choose a divisor.")
