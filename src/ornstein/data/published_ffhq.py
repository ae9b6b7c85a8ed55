"""FFHQ: 70,000 aligned faces, from its folders or zips at 1024 or 128 pixels, or from EDM's zip at any."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np

from ornstein.data.archive import Contents
from ornstein.data.base import Split, checked_split
from ornstein.data.describe import image_files
from ornstein.data.fetch import download as bring
from ornstein.data.published import PublishedImages, Some, check_zip, find, source_keys
from ornstein.data.stored import Files, Sources
from ornstein.data.zip_members import ZipMembers
from ornstein.errors import OrnsteinError

COUNT = 70_000
FULL, SMALL = "images1024x1024", "thumbnails128x128"
SMALL_SIZE = 128
# A copy of the makers' Google Drive, which has a daily limit; bytes; md5 of the first image (the makers' README).
ADDRESS = "https://archive.org/download/ffhq-dataset"
PUBLISHED = {
    FULL: (96_000_000_000, "ddeaeea6ce59569643715759d537fd1b"),
    SMALL: (2_100_000_000, "bd3e40b2ba20f76b55dc282907b89cd1"),
}


class FFHQ(PublishedImages):
    """Flickr-Faces-HQ (Karras et al. 2019, arXiv 1812.04948): 70,000 faces at 1024 x 1024, no two alike.

    Its makers appoint the first 60,000 for training and the last 10,000 for validation, which is the split here; but
    StyleGAN and EDM train on, and take FIDs against, all 70,000. With `held_out=1` train is as good as theirs.
    The licence is non-commercial.

    Args:
        split: "train" or "val".
        image_size, channels, crop, storage, max_bad: as of `PublishedImages`.
        root: the folder that holds `images1024x1024`, `thumbnails128x128`, a zip of either, or `ffhq-64x64.zip` (any
            size) as EDM's tool makes it, the first of these in this order; or such a zip itself. None looks in
            `ornstein.data.fetch.places`. Images are told by the numbers in their names.
        held_out: how many of the last numbers are val.
        download: fetch the zip of the thumbnails (2 GB), for an `image_size` above 128 that of the images (96 GB),
            where nothing is found (into `root` if given).
        labels: ignored: there are no classes.

    Raises:
        OrnsteinError: no images, thumbnails where larger images are asked for, or names without numbers.
    """

    splits: ClassVar[tuple[Split, ...]] = ("train", "val")

    def __init__(
        self,
        *,
        split: str,
        image_size: int = 64,
        channels: int = 3,
        crop: str = "adm",
        root: str | None = None,
        held_out: int = 10_000,
        download: bool = True,
        labels: bool = True,
        storage: str = "auto",
        max_bad: int = 0,
    ) -> None:
        chosen = checked_split(split, self.splits)
        if not 0 < held_out < COUNT:
            raise OrnsteinError(f"data.held_out={held_out}: give a number of images from 1 to {COUNT - 1}")
        wanted = SMALL if image_size <= SMALL_SIZE else FULL
        size, md5 = PUBLISHED[wanted]
        url = f"{ADDRESS}/{wanted}.zip"

        def fetch(home: Path) -> None:
            bring([url], home / f"{wanted}.zip", sha256=None, check=lambda path: _check(path, md5))

        named_zip = root is not None and root.endswith(".zip")
        place = find(
            "ffhq",
            root,
            seek=lambda folder: _seek(folder, image_size),
            fetch=fetch if download and not named_zip else None,
            what=f"FFHQ ({size / 1e9:.0f} GB) from {url}",
            how=f"Put {url}, or the folder that it unpacks to, into {{home}}",
            needed=size,
        )
        everything = _images(place)
        rows = _rows(everything, chosen, held_out)
        sources = Some(everything, rows)
        super().__init__(
            sources,
            keys=source_keys(sources),
            name="ffhq",
            split=chosen,
            labels=None,
            class_names=(),
            image_size=image_size,
            channels=channels,
            crop=crop,
            storage=storage,
            max_bad=max_bad,
        )


def _seek(folder: Path, image_size: int) -> Path | None:
    """The folder or zip of images in one of its places."""
    if folder.suffix == ".zip":
        return folder if folder.is_file() else None
    made = folder / f"ffhq-{image_size}x{image_size}.zip"
    small = (folder / SMALL, folder / f"{SMALL}.zip")
    for place in (folder / FULL, folder / f"{FULL}.zip", *small, made):
        if not (place.is_dir() or (place.suffix == ".zip" and place.is_file())):
            continue
        if place in small and image_size > SMALL_SIZE:
            raise OrnsteinError(
                f"{place} holds faces of 128 x 128 and data.image_size={image_size} wants larger ones: put {FULL} "
                "beside it, or name its folder with data.root=..."
            )
        return place
    return None


def _images(place: Path) -> Sources:
    """All images of a folder or zip."""
    if place.is_dir():
        return Files(list(image_files(place)), base=place)
    contents = Contents.of(place)
    return ZipMembers(contents.path, list(contents.images.values()), base=contents.base)


def _rows(sources: Sources, split: Split, held_out: int) -> np.ndarray:
    """The images of a split in the order of their numbers: int64 (N,)."""
    found: dict[int, int] = {}
    for row, name in enumerate(sources.names):
        number = _number(name)
        if number is None or number >= COUNT or number in found:
            raise OrnsteinError(
                f"{name} of {sources.home} bears no number of FFHQ's, 0 to {COUNT - 1}, of its own: name another "
                "data.root, or read any folder of images with data=image_folder"
            )
        found[number] = row
    wanted = range(COUNT - held_out) if split == "train" else range(COUNT - held_out, COUNT)
    rows = [found[number] for number in wanted if number in found]
    if not rows:
        raise OrnsteinError(
            f"{sources.home} holds no {split} images, those numbered {wanted[0]} to {wanted[-1]}: fetch the rest, set "
            "data.held_out, or read any folder of images with data=image_folder"
        )
    return np.array(rows, dtype=np.int64)


def _number(name: str) -> int | None:
    """The number of an image by its file's name: 00042.png, or img00000042.png as EDM's tool writes it."""
    digits = re.search(r"(\d+)$", Path(name).stem)
    return None if digits is None else int(digits.group())


def _check(path: Path, md5: str) -> None:
    """Refuse an archive that is damaged, or whose first image is not FFHQ's. Raises OSError."""
    check_zip(path)
    with zipfile.ZipFile(path) as archive:
        first = next((name for name in archive.namelist() if name.endswith(".png") and _number(name) == 0), None)
        if first is None or hashlib.md5(archive.read(first), usedforsecurity=False).hexdigest() != md5:
            raise OSError("its first image is not FFHQ's")
