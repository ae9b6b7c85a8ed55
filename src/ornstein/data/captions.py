"""Captions for images that have none: from the names of their classes, or from text files beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    import numpy as np

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMED = 3


def check_template(template: str | None) -> None:
    """Refuse a template without exactly one ``{}``, the place of the class's name (OrnsteinError)."""
    if template is not None and (not isinstance(template, str) or template.count("{}") != 1):
        raise OrnsteinError(
            f"data.caption_template={template!r} needs one {{}} where the class's name belongs, 'a photo of a {{}}' "
            "say; null is for no captions."
        )


def from_classes(template: str | None, labels: np.ndarray | None, names: Sequence[str]) -> list[str] | None:
    """One caption an image: the template with the name of its class; None without a template.

    Args:
        template: with one ``{}``.
        labels: int (N,).
        names: of the classes, as a caption should say them.

    Raises:
        OrnsteinError: a template without ``{}``, or images without classes.
    """
    check_template(template)
    if template is None:
        return None
    if labels is None:
        raise OrnsteinError(
            f"data.caption_template={template!r} names classes and this data has none: set data.num_classes=auto, or "
            "data.caption_template=null."
        )
    texts = [template.replace("{}", name) for name in names]
    return [texts[label] for label in labels.tolist()]


def from_files(paths: Sequence[Path], *, way_out: str = "set data.caption_files=false") -> list[str]:
    """The text of each image's ``.txt`` file of the same name beside it, on one line; ``way_out`` is what a message
    offers where there are none.

    Raises:
        OrnsteinError: files that are missing or cannot be read, the first by name.
    """
    captions, faults = [], []
    for path in paths:
        beside = path.with_suffix(".txt")
        try:
            captions.append(" ".join(beside.read_text(encoding="utf-8").split()))
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"{beside} ({getattr(error, 'strerror', None) or error})")
    if faults:
        more = " and more" if len(faults) > NAMED else ""
        raise OrnsteinError(
            f"{len(faults)} of {len(paths)} images have no caption file that can be read: {', '.join(faults[:NAMED])}"
            f"{more}; write them (an empty one is an empty caption), or {way_out}."
        )
    return captions
