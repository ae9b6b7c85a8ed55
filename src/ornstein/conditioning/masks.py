"""Masks that hide part of an image: half of it, a box, or strokes of a brush, from uniform numbers alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ornstein.errors import OrnsteinError

STROKES = 4
NUMBERS = 1 + 4 + 5 * STROKES
KINDS = ("half", "box", "free_form")


def hidden(u: Tensor, size: tuple[int, int], *, kind: str = "mixed") -> Tensor:
    """Masks (B, 1, H, W) in float32, 1 where the image is hidden: never all of it, never nothing, from 8 pixels a side.

    Args:
        u: uniform numbers (B, NUMBERS) in [0, 1), which decide everything.
        size: (H, W).
        kind: ``half`` (one of four), ``box`` (sides of 30 to 70 %), ``free_form`` (strokes), or ``mixed``, one of these
            by the first number.

    Raises:
        OrnsteinError: an unknown kind.
    """
    makers = dict(zip(KINDS, (_half, _box, _free_form), strict=True))
    if kind != "mixed":
        if kind not in makers:
            raise OrnsteinError(f"conditioner.mask={kind} is unknown: choose {', '.join(KINDS)} or mixed.")
        return makers[kind](u, size)
    which = (u[:, 0] * len(KINDS)).long().clamp(max=len(KINDS) - 1).reshape(-1, 1, 1, 1)
    mask = torch.zeros(len(u), 1, *size, device=u.device)
    for number, name in enumerate(KINDS):
        mask = torch.where(which == number, makers[name](u, size), mask)
    return mask


def _half(u: Tensor, size: tuple[int, int]) -> Tensor:
    y, x = _coordinates(size, u.device)
    side = (u[:, 1] * 4).long().reshape(-1, 1, 1, 1)
    halves = torch.stack([(y < 0.5).expand(1, 1, *size), (y >= 0.5).expand(1, 1, *size)])
    across = torch.stack([(x < 0.5).expand(1, 1, *size), (x >= 0.5).expand(1, 1, *size)])
    every = torch.cat([halves, across]).float()  # (4, 1, 1, H, W)
    return sum(
        ((side == number) * every[number] for number in range(4)), torch.zeros(len(u), 1, *size, device=u.device)
    )


def _box(u: Tensor, size: tuple[int, int]) -> Tensor:
    y, x = _coordinates(size, u.device)
    side_y, side_x = (0.3 + 0.4 * _column(u, column) for column in (1, 2))
    top, left = (_column(u, column) * (1 - side) for column, side in ((3, side_y), (4, side_x)))
    inside = (y >= top) & (y < top + side_y) & (x >= left) & (x < left + side_x)
    return inside.float()


def _free_form(u: Tensor, size: tuple[int, int]) -> Tensor:
    """Straight strokes: all points within half a brush of a segment."""
    y, x = _coordinates(size, u.device)
    mask = torch.zeros(len(u), 1, *size, dtype=torch.bool, device=u.device)
    for stroke in range(STROKES):
        y0, x0, y1, x1, width = (_column(u, 5 + 5 * stroke + column) for column in range(5))
        dy, dx = y1 - y0, x1 - x0
        along = (((y - y0) * dy + (x - x0) * dx) / (dy**2 + dx**2).clamp(min=1e-6)).clamp(0, 1)
        distance = (y - y0 - along * dy) ** 2 + (x - x0 - along * dx) ** 2
        # No stroke slips between the pixels' centres, which are at most 0.71 pixels from anywhere.
        mask |= distance <= (0.04 + 0.06 * width).clamp(min=0.75 / min(size)) ** 2
    return mask.float()


def _column(u: Tensor, column: int) -> Tensor:
    return u[:, column].reshape(-1, 1, 1, 1)


def _coordinates(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels' centres in [0, 1], (1, 1, H, 1) and (1, 1, 1, W)."""
    y, x = ((torch.arange(side, device=device) + 0.5) / side for side in size)
    return y.reshape(1, 1, -1, 1), x.reshape(1, 1, 1, -1)
