"""Any folder of images: its files, their classes and splits, without those that cannot be read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ornstein.data.bad import Bad
from ornstein.data.base import KEY_BYTES, SPLITS, ImageDataset, Images, RowsOf, Split, checked_split
from ornstein.data.bucket_files import SomeOf, stored_alike, stored_somehow
from ornstein.data.bucketed import BucketedImages
from ornstein.data.buckets import bucket_shapes
from ornstein.data.captions import check_template, from_classes, from_files
from ornstein.data.describe import (
    EXTENSIONS,
    LABEL_FILE,
    NAMED,
    class_names,
    find_root,
    image_files,
    label_file,
    parts_of,
    read_labels,
    read_text,
)
from ornstein.data.files import content_of, split_files
from ornstein.data.images import check_channels, check_size, checked_crop
from ornstein.data.stored import Files, checked_storage, report_path, stored, verify
from ornstein.errors import OrnsteinError


class ImageFolder(ImageDataset):
    """All images below a folder: png, jpg, webp, bmp, gif (first frame), tiff.

    Classes are what a `dataset.json` in EDM's style says (in the root or in a split's folder), else the names of the
    root's sub-folders, where there are at least two. Sub-folders `train` and `val` (or `valid`, `validation`, `test`)
    are taken as the splits, `test` as a third where val has another name; otherwise the images are split by content,
    so that a file and its copy stay on one side.

    Args:
        split: "train", "val" or "test".
        root: the folder.
        image_size: side of the square that is made of every image.
        buckets: (height, width) of several shapes instead, of which each image gets the one nearest to its own; see
            `ornstein.data.buckets.parse_buckets`.
        channels: 3 (RGB) or 1 (grey).
        crop: how, see `ornstein.data.images.fit`.
        val_fraction, test_fraction: shares of the images held out, where the folder does not say itself.
        labels: False leaves the classes out, True takes them if there are any.
        storage: see `ornstein.data.stored.stored`.
        max_bad: how many images, of all splits together, may be left out since they cannot be read. They are named
            in a warning and in a report in the cache folder.
        caption_files: captions from text files beside the images, `cat.txt` for `cat.png`.
        caption_template: captions from the classes' names, `{}` being their place; None leaves captions out.
        condition_root: a folder with one more image for each of these (a depth map, edges) at the same place
            below it and of the same name, whatever its extension; cropped and resized alike.
        condition_channels: of those, 1 (grey) or 3 (RGB).

    Raises:
        OrnsteinError: no folder, no images, more than `max_bad` that cannot be read (the first ten are named), a
            wrong `dataset.json`, images outside the class folders, images without caption file or condition, or no
            room on the disk.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS

    def __init__(
        self,
        *,
        split: str,
        root: str | None,
        image_size: int = 64,
        channels: int = 3,
        crop: str = "adm",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        labels: bool = True,
        storage: str = "auto",
        max_bad: int = 0,
        caption_files: bool = False,
        caption_template: str | None = None,
        condition_root: str | None = None,
        condition_channels: int = 1,
        buckets: Any = None,
    ) -> None:
        chosen = checked_split(split, self.splits)
        check_size(image_size, name="image_folder")
        check_channels(channels)
        check_channels(condition_channels, key="condition_channels")
        check_template(caption_template)
        cut, way = checked_crop(crop), checked_storage(storage)
        several = bucket_shapes(buckets, image_size=image_size)
        if caption_files and caption_template is not None:
            raise OrnsteinError("data.caption_files=true and data.caption_template both make captions: leave one out")
        folder = find_root(root)
        bad = Bad(max_bad, where=f"data.root={folder}")
        listed = _listed(folder)
        found = split_files(
            listed, chosen, root=folder, val_fraction=val_fraction, test_fraction=test_fraction, bad=bad
        )
        names = class_names(folder) if labels else ()
        classes = _classes(found.paths, chosen, folder, names) if names else None

        shape = (len(found.paths), channels, image_size, image_size)
        images, kept = stored_somehow(way, Files(found.paths, base=folder), shape, buckets=several, crop=cut, bad=bad)
        conditions: Images | None = None
        if condition_root is not None:
            partners = Files(_partners(found.paths, folder, condition_root), base=Path(condition_root).parent)
            if isinstance(images, BucketedImages):
                own = SomeOf(partners, kept)
                conditions, whole = stored_alike(images, way, own, channels=condition_channels, crop=cut, bad=bad)
                whole = kept[whole]
            else:
                size = (len(partners), condition_channels, *shape[2:])
                conditions, whole = stored(way, partners, size, crop=cut, bad=bad)
            both = np.intersect1d(kept, whole)
            images, conditions, kept = _narrowed(images, kept, both), _narrowed(conditions, whole, both), both
        if bad.count and way != "unchecked":
            # The limit counts over all splits, and one message names them all.
            others = Files(found.others, base=folder)
            verify(others, (len(others), *shape[1:]), crop=cut, bad=bad)
            if condition_root is not None:
                partners = Files(_partners(found.others, folder, condition_root), base=partners.base)
                verify(partners, (len(others), condition_channels, *shape[2:]), crop=cut, bad=bad)
        bad.settle(report_path(folder))
        if not len(kept):
            raise OrnsteinError(f"no {chosen} image of data.root={folder} is left: name another data.root")

        self.paths = [found.paths[row] for row in kept.tolist()]
        classes = None if classes is None else classes[kept]
        super().__init__(
            images,
            name="image_folder",
            split=chosen,
            labels=classes,
            class_names=names,
            captions=from_files(self.paths) if caption_files else from_classes(caption_template, classes, names),
            conditions=conditions,
            content=content_of(cut, found.keys[kept]),
            keys=found.keys[kept, KEY_BYTES:],
        )


def _listed(root: Path) -> dict[Split, list[Path]]:
    """The image files of each split that the folder says it has; of one whole that is ours to split, under train."""
    parts = parts_of(root)
    folders: dict[Split, Path | None] = {"train": parts.train}
    if parts.given:
        folders |= {"val": parts.val, "test": parts.test}
    return {split: list(image_files(folder)) for split, folder in folders.items() if folder is not None}


def _narrowed(images: Images, have: np.ndarray, wanted: np.ndarray) -> Images:
    """Of an array whose rows are `have`, those that are `wanted`; both rise."""
    if isinstance(images, BucketedImages):
        return images.subset(np.searchsorted(have, wanted), RowsOf)
    return images if len(have) == len(wanted) else RowsOf(images, np.searchsorted(have, wanted))


def _classes(paths: Sequence[Path], split: Split, root: Path, names: Sequence[str]) -> np.ndarray:
    """The class of each file: int64 (N,), by `dataset.json` or by the first folder below the split's own."""
    parts = parts_of(root)
    base = {"train": parts.train, "val": parts.val, "test": parts.test}[split] or root
    told = label_file(base, root)
    if told is not None:
        return _told_classes(paths, told, root, names)
    if label_file(parts.train, root) is not None:
        raise OrnsteinError(f"{base} has no {LABEL_FILE} and {parts.train} has one: add it")
    number = {name: index for index, name in enumerate(names)}
    firsts = [path.relative_to(base).parts for path in paths]
    loose = [str(path) for path, parts in zip(paths, firsts, strict=True) if len(parts) == 1]
    if loose:
        raise OrnsteinError(
            f"{len(loose)} image(s) lie in no class folder, {', '.join(loose[:NAMED])} among them: "
            "move them into one, or train without classes (data.num_classes=null)"
        )
    unknown = sorted({parts[0] for parts in firsts} - number.keys())
    if unknown:
        raise OrnsteinError(f"{base} has classes that train has not ({', '.join(unknown[:NAMED])}): remove them")
    return np.array([number[parts[0]] for parts in firsts], dtype=np.int64)


def _told_classes(paths: Sequence[Path], told: Path, root: Path, names: Sequence[str]) -> np.ndarray:
    """The class of each file as a `dataset.json` says it, which must speak of all images beside it and no others."""
    beside = [path for files in _listed(root).values() for path in files if path.is_relative_to(told.parent)]
    called = [path.relative_to(told.parent).as_posix() for path in beside]
    labels = read_labels(read_text(told), called, where=str(told))
    if labels is None:
        raise OrnsteinError(f"{told} has no labels (null) and train's file has: give it some")
    by_path = dict(zip(beside, labels.tolist(), strict=True))
    classes = np.array([by_path[path] for path in paths], dtype=np.int64)
    if classes.max(initial=-1) >= len(names):
        raise OrnsteinError(f"{told} has a label {classes.max()} and train has {len(names)} classes: remove it")
    return classes


def _partners(paths: Sequence[Path], root: Path, condition_root: str) -> list[Path]:
    """The image of a parallel folder for each image: at the same place, its own extension preferred."""
    other = Path(condition_root).expanduser()
    if not other.is_dir():
        raise OrnsteinError(f"data.condition_root={condition_root} is no folder: name one with an image for each image")
    found, missing = [], []
    for path in paths:
        same = other / path.relative_to(root)
        every = [same, *(same.with_suffix(end) for end in sorted(EXTENSIONS))]
        partner = next((each for each in every if each.is_file()), None)
        if partner is None:
            missing.append(same)
        else:
            found.append(partner)
    if missing:
        raise OrnsteinError(
            f"data.condition_root={condition_root} has no image for {len(missing)} of {len(paths)} images, "
            f"{missing[0]} the first: add them, or leave data.condition_root out"
        )
    return found
