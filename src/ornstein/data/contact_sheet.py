"""A sheet of pictures of a data set with what is known of each, for a person to look at."""

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ornstein.data.base import ImageDataset

CELL = 96
GAP = 6
TEXT = 11


def contact_sheet(images: ImageDataset, *, count: int = 64) -> Image.Image:
    """`count` images, evenly spaced over a data set, in a square of cells; below each its class or its caption.

    Small images are enlarged by one whole factor, so that their pixels stay what they are. What an image is conditioned
    on stands to its right.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64)).tolist()
    factor = max(1, CELL // max(side for shape in images.shapes for side in shape))
    pictures = [_picture(images, row, factor) for row in rows]
    texts = [_text(images, row) for row in rows]
    width, height = (max(each.size[axis] for each in pictures) for axis in (0, 1))
    below = TEXT + 4 if any(texts) else 0
    columns = math.ceil(math.sqrt(len(rows)))
    lines = math.ceil(len(rows) / columns)
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), GAP + lines * (height + below + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=TEXT)
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left = GAP + number % columns * (width + GAP)
        top = GAP + number // columns * (height + below + GAP)
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        draw.text((left, top + height + 1), _fitted(text, width, font), fill="black", font=font)
    return sheet


def _picture(images: ImageDataset, row: int, factor: int) -> Image.Image:
    """An image, and what it is conditioned on beside it."""
    parts = [images.images[np.array([row])][0]]
    if images.conditions is not None:
        parts.append(images.conditions[np.array([row])][0])
    shown = [np.broadcast_to(part, (3, *part.shape[1:])) if len(part) == 1 else part for part in parts]
    picture = Image.fromarray(np.ascontiguousarray(np.concatenate(shown, axis=2).transpose(1, 2, 0)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _text(images: ImageDataset, row: int) -> str:
    if images.captions is not None:
        return images.captions[row]
    return "" if images.labels is None else images.class_names[images.labels[row]]


def _fitted(text: str, width: int, font: Any) -> str:
    """A text, cut where it would run into the next cell."""
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
