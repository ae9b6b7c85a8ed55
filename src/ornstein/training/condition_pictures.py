"""How grids of samples show what the samples were conditioned on: rows of conditions, and captions in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

LONGEST = 28  # letters of a caption that a row's label shows


def shorten(caption: str) -> str:
    """A caption as a row's label: its first letters."""
    return caption if len(caption) <= LONGEST else caption[: LONGEST - 1].rstrip() + "…"


def short_labels(captions: Sequence[str]) -> list[str]:
    """Captions as the labels of a grid's rows: without the words that all begin with, and shortened."""
    words = [caption.split() for caption in captions]
    shared = 0
    while len(words) > 1 and all(len(each) > shared and each[shared] == words[0][shared] for each in words):
        shared += 1
    return [shorten(" ".join(each[shared:]) or caption) for each, caption in zip(words, captions, strict=True)]


def fitted(pictures: Tensor, like: Tensor) -> Tensor:
    """uint8 pictures (B, C', h, w) with the size and channels of images (B, C, H, W): enlarged by repeating pixels."""
    if pictures.shape[-2:] != like.shape[-2:]:
        pictures = functional.interpolate(pictures.float(), size=like.shape[-2:], mode="nearest").to(torch.uint8)
    if pictures.shape[1] == like.shape[1]:
        return pictures
    return pictures.expand(-1, 3, -1, -1) if like.shape[1] == 3 else pictures[:, :1]


def interleaved(images: Tensor, conditions: Tensor, columns: int) -> tuple[Tensor, list[str]]:
    """Rows of conditions, each above the row of samples made from them, and the rows' labels.

    Args:
        images, conditions: uint8 (N, C, H, W).
        columns: of the grid; a last row that is not full is filled up with black.
    """
    missing = -len(images) % columns
    filling = images.new_zeros(missing, *images.shape[1:])
    rows = [torch.cat([part, filling]).split(columns) for part in (conditions, images)]
    pairs = [part for pair in zip(*rows, strict=True) for part in pair]
    return torch.cat(pairs), ["given", "sample"] * (len(pairs) // 2)


def captions_text(indices: Sequence[int], captions: Sequence[str]) -> str:
    """A line a sample: its number, a tab, its caption."""
    return "".join(f"{index:06d}\t{caption}\n" for index, caption in zip(indices, captions, strict=True))
