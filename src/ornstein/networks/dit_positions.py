"""How tokens know where in the image they are: tables added to them, or rotations of their queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ornstein.errors import OrnsteinError
from ornstein.networks.embeddings import sincos_positions

POSITIONS = ("sincos", "rope", "sincos_rope", "learned")
Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, each (tokens, head_dim)


def rotary_table(
    rows: int, columns: int, head_dim: int, *, prefix: int = 0, device: torch.device | None = None
) -> Rotation:
    r"""Angles of 2-D axial rotary positions as cosines and signed sines, for `rotate`.

    Neighbouring pairs of a head's channels are turned by :math:`p\,\theta_j`, where p is the row for the first half
    of the channels and the column for the second, and :math:`\theta_j = 10000^{-4j/d}`, `j = 0 .. d/4 - 1`.

    Source: Su et al. 2021 (arXiv 2104.09864) for the rotation; Fang et al. 2023 (EVA-02, arXiv 2303.11331) and Yao et
    al. 2025 (LightningDiT, arXiv 2501.01423) for this axial form.

    Args:
        rows: of the grid of patches.
        columns: of the grid of patches.
        head_dim: channels of a head, divisible by 4.
        prefix: tokens before the patches, which are not turned.
        device: where to make them.

    Returns:
        Two tensors `(prefix + rows * columns, head_dim)`, float32.

    Raises:
        OrnsteinError: `head_dim` is not divisible by 4.
    """
    _check_turning(head_dim)
    quarter = head_dim // 4
    theta = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)

    def axis(length: int) -> Tensor:
        places = torch.arange(length, dtype=torch.float64, device=device)
        return (places[:, None] * theta).repeat_interleave(2, dim=-1)

    by_row = axis(rows)[:, None].expand(rows, columns, -1)
    by_column = axis(columns)[None].expand(rows, columns, -1)
    angles = torch.cat([by_row, by_column], dim=-1).reshape(rows * columns, head_dim)
    angles = F.pad(angles, (0, 0, prefix, 0))
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64, device=device).repeat(head_dim // 2)
    return angles.cos().float(), (angles.sin() * signs).float()


def _check_turning(head_dim: int) -> None:
    if head_dim % 4:
        raise OrnsteinError(
            f"positions=rope turns pairs of channels by row and by column, so a head's channels must be divisible by "
            f"4, got {head_dim}: choose another hidden_size or heads."
        )


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn queries or keys `x (B, heads, N, head_dim)` by `rotary_table`'s angles; computed in float32 or finer."""
    cosines, sines = rotation
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cosines, swapped, sines).to(x.dtype)


class Positions(nn.Module):
    """Positions of patches on a grid of any size, made once a size.

    `sincos` adds fixed sines and cosines to the tokens (DiT), `rope` turns queries and keys (`rotary_table`),
    `sincos_rope` does both (LightningDiT), and `learned` adds a trained table of the grid of `image_size` (U-ViT, Bao
    et al. 2023, arXiv 2209.12152), interpolated for other sizes.
    """

    def __init__(self, kind: str, hidden_size: int, *, head_dim: int, grid: tuple[int, int] | None) -> None:
        """Make positions for tokens of `hidden_size` channels in heads of `head_dim`.

        Args:
            kind: `sincos`, `rope`, `sincos_rope` or `learned`.
            hidden_size: channels of a token.
            head_dim: channels of a head.
            grid: rows and columns of the training size, which `learned` needs.

        Raises:
            OrnsteinError: an unknown kind, widths that do not divide, or `learned` without a size.
        """
        super().__init__()
        if kind not in POSITIONS:
            raise OrnsteinError(f"positions is one of {', '.join(POSITIONS)}, got '{kind}'.")
        self.adds = kind in ("sincos", "sincos_rope")
        self.turns = kind in ("rope", "sincos_rope")
        if self.adds and hidden_size % 4:
            raise OrnsteinError(f"hidden_size must be divisible by 4 for 2-D positions, got {hidden_size}.")
        if self.turns:
            _check_turning(head_dim)
        self.hidden_size, self.head_dim, self.grid = hidden_size, head_dim, grid
        self.table: nn.Parameter | None = None
        if kind == "learned":
            if grid is None:
                raise OrnsteinError("positions=learned is a table for one size: give image_size as well.")
            self.table = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1], hidden_size))
        self._made: dict[tuple[object, ...], Any] = {}

    def added(self, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """Return what is added to the tokens of a grid, `(rows * columns, hidden_size)`, or None."""
        if self.table is not None:
            return self._interpolated(rows, columns)
        if not self.adds:
            return None
        return self._once(
            ("added", rows, columns, device), lambda: sincos_positions(rows, columns, self.hidden_size, device=device)
        )

    def rotation(self, rows: int, columns: int, device: torch.device, *, prefix: int) -> Rotation | None:
        """Return how queries and keys of `prefix` tokens and a grid of patches are turned, or None."""
        if not self.turns:
            return None
        return self._once(
            ("turned", rows, columns, prefix, device),
            lambda: rotary_table(rows, columns, self.head_dim, prefix=prefix, device=device),
        )

    def _interpolated(self, rows: int, columns: int) -> Tensor:
        assert self.table is not None and self.grid is not None
        if (rows, columns) == self.grid:
            return self.table
        table = self.table.view(1, *self.grid, self.hidden_size).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
        return table.flatten(2)[0].T

    def _once(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        # A compiled or exported graph holds its own: nothing is to be remembered from within it.
        if torch.compiler.is_compiling():
            return make()
        if key not in self._made:
            with torch.inference_mode(False):  # what a validation makes first, training must be able to use
                self._made[key] = make()
        return self._made[key]
