"""The most and the least realistic of all evaluated samples, each above the training image nearest to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ornstein.training.pictures import TILE, image_grid, letterboxed, to_pil
from ornstein.training.scoring import training_statistics

if TYPE_CHECKING:
    from ornstein.metrics.generative import GenerativeMetrics
    from ornstein.metrics.realism import BestWorst, Extremes, Judged

log = logging.getLogger(__name__)
FILE = "best_and_worst.png"
COLUMNS = ("kind", "rank", "sample", "nearest training image", "realism", "distance", "class", "number", "nearest is")
_ACROSS = 8  # samples side by side
_GROUND, _INK, _SOFT = (32, 32, 36), (235, 235, 235), (165, 165, 172)
_GAP, _LINE, _HEAD, _FONT = 10, 15, 34, 12
_TITLES = {
    "best": "most realistic samples, each above its nearest training image (R of 1 and above: among real images)",
    "worst": "least realistic samples, each above its nearest training image",
}


def judge_of(metrics: GenerativeMetrics, training: Any, *, batch_size: int = 256) -> BestWorst | None:
    """What judges each sample among the training images (collective); None where ``metrics.best_worst`` asks for none
    or there are too few training images, which is told of in one line.
    """
    if not metrics.best_worst:
        return None
    from ornstein.metrics.realism import NEIGHBOURS, BestWorst, Realism

    real = training_statistics(metrics, training, batch_size=batch_size)
    if len(real.features) <= NEIGHBOURS:
        log.warning("no best and worst samples are shown: %d training images are too few", len(real.features))
        return None
    return BestWorst(Realism(real), count=metrics.best_worst)


def draw_extremes(extremes: Extremes, *, training: Any, class_names: Sequence[str] = ()) -> Image.Image:
    """Best samples in the upper half, worst in the lower one; below each pair its realism, class and number.

    Args:
        extremes: at least one sample of either kind.
        training: the data set that the nearest images' numbers are of.
        class_names: of the labels; their numbers where there are none.
    """
    judged = [*extremes.best, *extremes.worst]
    tiles = letterboxed([*(each.image for each in judged), *_nearest(judged, training)])
    pairs = torch.stack([tiles[: len(judged)], tiles[len(judged) :]], dim=1)
    count = len(extremes.best)
    halves = [("best", extremes.best, pairs[:count]), ("worst", extremes.worst, pairs[count:])]
    drawn = [_half(_TITLES[kind], own, cells, class_names) for kind, own, cells in halves]
    whole = Image.new("RGB", (max(half.width for half in drawn), sum(half.height for half in drawn)), _GROUND)
    top = 0
    for half in drawn:
        whole.paste(half, (0, top))
        top += half.height
    return whole


def extremes_rows(extremes: Extremes, *, training: Any, class_names: Sequence[str] = ()) -> list[list[Any]]:
    """A row a sample under :data:`COLUMNS`, pictures as Pillow images."""
    rows = []
    for kind, judged in (("best", extremes.best), ("worst", extremes.worst)):
        for rank, (each, real) in enumerate(zip(judged, _nearest(judged, training), strict=True), 1):
            figures = (round(each.realism, 4), round(each.distance, 6), _class(each, class_names))
            rows.append([kind, rank, _tile(each.image), _tile(real), *figures, each.sample, each.nearest])
    return rows


def _half(title: str, judged: Sequence[Judged], pairs: Tensor, class_names: Sequence[str]) -> Image.Image:
    """A title, and rows of pairs (N, 2, C, H, W) with two lines of text below each."""
    cells = [image_grid(pair, 1, scale=_scale(pair.shape[-1])) for pair in pairs]
    width, height = cells[0].width + _GAP, cells[0].height + 2 * _LINE + _GAP
    across = min(_ACROSS, len(cells))
    heading, font = ImageFont.load_default(14), ImageFont.load_default(_FONT)
    wide = max(across * width + _GAP, round(heading.getlength(title)) + 2 * _GAP)
    half = Image.new("RGB", (wide, _HEAD + -(-len(cells) // across) * height), _GROUND)
    draw = ImageDraw.Draw(half)
    draw.text((_GAP, _HEAD / 2), title, fill=_INK, font=heading, anchor="lm")
    for place, (each, cell) in enumerate(zip(judged, cells, strict=True)):
        left, top = _GAP + place % across * width, _HEAD + place // across * height
        half.paste(cell, (left, top))
        lines = (f"R {each.realism:.2f}", " ".join([*_words(each, class_names), f"#{each.sample}"]))
        for line, (text, ink) in enumerate(zip(lines, (_INK, _SOFT), strict=True)):
            middle = (left + cell.width / 2, top + cell.height + (line + 0.6) * _LINE)
            draw.text(middle, _shortened(text, font, width - 2), fill=ink, font=font, anchor="mm")
    return half


def _words(each: Judged, class_names: Sequence[str]) -> list[str]:
    name = _class(each, class_names)
    return [] if name is None else [name]


def _class(each: Judged, class_names: Sequence[str]) -> str | None:
    if each.label is None:
        return None
    return class_names[each.label] if each.label < len(class_names) else str(each.label)


def _shortened(text: str, font: Any, width: float) -> str:
    """A text that fits: letters of its first word give way, the sample's number at its end stays."""
    name, space, number = text.rpartition(" ")
    while name and font.getlength(f"{name}… {number}") > width and font.getlength(text) > width:
        name = name[:-1]
        text = f"{name}…{space}{number}" if name else number
    return text


def _nearest(judged: Sequence[Judged], training: Any) -> list[Tensor]:
    return [training.batch([each.nearest])["image"][0] for each in judged]


def _tile(image: Tensor) -> Image.Image:
    picture, factor = to_pil(image), _scale(image.shape[-1])
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _scale(width: int) -> int:
    return max(1, round(TILE / width))
