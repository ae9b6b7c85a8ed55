"""Grids, strips and animations of uint8 images, by Pillow alone, written whole or not at all."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ornstein.errors import OrnsteinError

TILE = 72  # pixels that a tiny image should fill, so that a person reads an 8x8 digit
MAX_WIDTH = 1024
_GAP = 2
_BACKGROUND, _INK = (32, 32, 36), (235, 235, 235)
_LABEL_SHARE = 0.3  # of the grid's width that row labels may take


def near_square(count: int) -> int:
    """Columns of a grid of ``count`` tiles that is as wide as high, or a little wider."""
    return max(1, math.ceil(math.sqrt(count)))


def readable_scale(width: int, columns: int) -> int:
    """Whole factor that brings tiles ``width`` pixels wide to about :data:`TILE`, the grid to at most
    :data:`MAX_WIDTH`.
    """
    return max(1, min(round(TILE / width), (MAX_WIDTH - _GAP) // columns // (width + 1)))


def image_grid(
    images: Tensor,
    columns: int,
    *,
    scale: int | None = None,
    row_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Images row by row on a dark ground, enlarged by repeating pixels.

    Args:
        images: uint8 (N, C, H, W) with C = 1 or 3.
        columns: tiles in a row, at least 1.
        scale: whole enlargement; :func:`readable_scale` unless given.
        row_labels: a text for each row, drawn at its left where it fits: rows at least 9 pixels high and the
            longest text within three tenths of the grid's width. Left out otherwise.

    Raises:
        OrnsteinError: images of another type or shape, or no columns.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8 or columns < 1:
        raise OrnsteinError(
            f"a grid needs uint8 images (N, 1 or 3, H, W) and at least one column, got {images.dtype} "
            f"{tuple(images.shape)} and {columns}."
        )
    count, _, height, width = images.shape
    factor = readable_scale(width, columns) if scale is None else scale
    step_x, step_y = width * factor + _GAP, height * factor + _GAP
    rows = -(-count // columns)
    grid = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), _BACKGROUND)
    for number, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).resize(
            (width * factor, height * factor), Image.Resampling.NEAREST
        )
        grid.paste(tile, (_GAP + number % columns * step_x, _GAP + number // columns * step_y))
    return grid if row_labels is None else _with_labels(grid, row_labels, step_y)


def _with_labels(grid: Image.Image, labels: Sequence[str], row_height: int) -> Image.Image:
    size = min(16, row_height - _GAP)
    if size < 9 or not any(labels):
        return grid
    font = ImageFont.load_default(size)
    widths = [font.getlength(label) for label in labels]
    margin = math.ceil(max(widths)) + 12
    if margin > _LABEL_SHARE * grid.width:
        return grid
    whole = Image.new("RGB", (grid.width + margin, grid.height), _BACKGROUND)
    whole.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(whole)
    for row, label in enumerate(labels):
        middle = _GAP // 2 + row * row_height + row_height / 2
        draw.text((margin - 8, middle), label, fill=_INK, font=font, anchor="rm")
    return whole


def letterboxed(images: Sequence[Tensor]) -> Tensor:
    """Images of several shapes as tiles of one: each in the middle of the smallest rectangle that holds them all.

    Args:
        images: uint8 (C, H, W) each.

    Returns:
        uint8 (N, C, H, W), or where they differ in shape (N, 3, H, W) on the grid's dark ground.

    Raises:
        OrnsteinError: there are none.
    """
    if not images:
        raise OrnsteinError("a grid needs at least one image.")
    if len({image.shape for image in images}) == 1:
        return torch.stack(list(images))
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    ground = torch.tensor(_BACKGROUND, dtype=torch.uint8).view(1, 3, 1, 1)
    tiles = ground.repeat(len(images), 1, height, width)
    for tile, image in zip(tiles, images, strict=True):
        top, left = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
        tile[:, top : top + image.shape[1], left : left + image.shape[2]] = image.cpu()
    return tiles


def strip(rows: Sequence[Tensor], *, labels: Sequence[str] | None = None, scale: int | None = None) -> Image.Image:
    """One row of tiles for each of ``rows``, all of the same length.

    Args:
        rows: uint8 (columns, C, H, W) each.
        labels: a text for each row.
        scale: whole enlargement; readable unless given.

    Raises:
        OrnsteinError: no rows, or rows of different lengths.
    """
    if not rows or len({row.shape for row in rows}) != 1:
        raise OrnsteinError("a strip needs at least one row of tiles, and all rows of one shape.")
    return image_grid(torch.cat(list(rows)), len(rows[0]), scale=scale, row_labels=labels)


def beside(left: Image.Image, right: Image.Image, *, titles: tuple[str, str]) -> Image.Image:
    """Two pictures of one height side by side, each with a title above it; what does not fit is left out."""
    size = 12
    font = ImageFont.load_default(size)
    whole = Image.new("RGB", (left.width + 3 * _GAP + right.width, 2 * size + left.height), _BACKGROUND)
    draw = ImageDraw.Draw(whole)
    # Row labels, if any, stand at the left of the first: both titles begin where the tiles do.
    for picture, at, title in ((left, 0, titles[0]), (right, left.width + 3 * _GAP, titles[1])):
        whole.paste(picture, (at, 2 * size))
        middle = at + picture.width - right.width / 2
        if font.getlength(title) <= right.width:
            draw.text((middle, size), title, fill=_INK, font=font, anchor="mm")
    return whole


def to_pil(image: Tensor) -> Image.Image:
    """One uint8 image (1 or 3, H, W) as it is."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Writes a PNG, atomically; makes its folder."""
    return write_whole(Path(path), lambda partial: image.save(partial, format="PNG"))


def save_text(text: str, path: str | Path) -> Path:
    """Writes a text beside a picture, atomically; makes its folder."""
    return write_whole(Path(path), lambda partial: _write_text(Path(partial), text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_whole(path: Path, write: Callable[[str], None]) -> Path:
    """Lets ``write`` fill a file beside ``path`` that then takes its place; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".partial")
    os.close(handle)
    try:
        write(partial)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path
