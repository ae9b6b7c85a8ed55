"""A zip file of images, as EDM's and StyleGAN's dataset tools write it, read as it is."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from ornstein.data.bad import Bad
from ornstein.data.base import SPLITS, ImageDataset, NoSplit, Split, checked_split
from ornstein.data.captions import check_template, from_classes
from ornstein.data.describe import EXTENSIONS, LABEL_FILE, NAMED, VAL_FOLDERS, read_class_names, read_labels
from ornstein.data.images import check_channels, check_size, checked_crop
from ornstein.data.splits import split_mask
from ornstein.data.stored import DECODING, checked_storage, report_path, stored, verify
from ornstein.data.zip_members import ZipMembers
from ornstein.errors import OrnsteinError


class ImageZip(ImageDataset):
    """All images in a zip file, stored or deflated, in whatever folders.

    Classes are what its `dataset.json` says (`{"labels": [["00000/img00000000.png", 6], ...]}`, in the root or in a
    split's folder; null: none); without such a file they are the names of the root's folders, where there are at least
    two. Folders `train` and `val` (or `valid`, `validation`, `test`) in the root are taken as the splits, `test` as a
    third where val has another name; otherwise the images are split by content. One folder around everything does not
    count.

    Args: as of `ornstein.data.ImageFolder`, `root` being the zip file.

    Raises:
        OrnsteinError: no zip file, no images in it, more than `max_bad` that cannot be read, members that are encrypted
            or packed otherwise, a wrong `dataset.json`, images outside the class folders, or no room on the disk.
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
        caption_template: str | None = None,
    ) -> None:
        chosen = checked_split(split, self.splits)
        check_size(image_size, name="zip")
        check_channels(channels)
        check_template(caption_template)
        cut, way = checked_crop(crop), checked_storage(storage)
        contents = Contents.of(root)
        own = contents.part(chosen)
        if chosen == "test" and not contents.given and test_fraction == 0:
            raise NoSplit("there is no test split: set data.test_fraction, to 0.1 say")
        bad = Bad(max_bad, where=f"data.root={contents.path}")
        members = contents.members(own)
        rows, keys = members.content_keys(bad)
        if not contents.given:
            if len(set(keys)) < 2:
                bad.settle()
            mask = split_mask(keys, chosen, val_fraction=val_fraction, test_fraction=test_fraction)
            others = [row for row, mine in zip(rows, mask.tolist(), strict=True) if not mine]
            rows, keys = _where(rows, mask), _where(keys, mask)
        else:
            others = []
        sources = members.take(rows)
        shape = (len(rows), channels, image_size, image_size)
        images, kept = stored(way, sources, shape, crop=cut, bad=bad)
        if bad.count and way != "unchecked" and others:
            # The limit counts over all splits, and one message names them all.
            verify(members.take(others), (len(others), *shape[1:]), crop=cut, bad=bad)
        bad.settle(report_path(contents.path))
        if not len(kept):
            raise OrnsteinError(f"no {chosen} image of data.root={contents.path} is left: name another data.root")
        names = contents.class_names if labels else ()
        classes = contents.classes(own)[np.asarray(rows)[kept]] if names else None
        keys = [keys[row] for row in kept.tolist()]
        super().__init__(
            images,
            name="zip",
            split=chosen,
            labels=classes,
            class_names=names,
            captions=from_classes(caption_template, classes, names),
            content=f"{DECODING} {cut}".encode() + b"".join(keys),
            keys=np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16),
        )
        self.paths = [f"{contents.path}:{sources.names[row]}" for row in kept.tolist()]

    @classmethod
    def count_classes(cls, options: Mapping[str, Any]) -> int | None:
        """How many classes the zip file has, or None: what `data.num_classes=auto` stands for. Decodes nothing."""
        return len(Contents.of(options.get("root")).class_names) or None

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Refuse, before anything is built, what is no zip file of images (OrnsteinError)."""
        Contents.of(options.get("root"))


@dataclass(frozen=True)
class Contents:
    """What a zip file lists.

    Attributes:
        path: of the zip file.
        base: the folder around everything, with its slash, or "".
        images: its images by name below the base, sorted.
        texts: each `dataset.json` by its folder below the base ("" for the root).
    """

    path: Path
    base: str
    images: dict[str, zipfile.ZipInfo]
    texts: dict[str, str]

    @classmethod
    def of(cls, root: str | Path | None) -> "Contents":
        """Reads a zip file's directory. Raises OrnsteinError where there is none, or no image in it."""
        if root is None:
            raise OrnsteinError("data=zip needs a zip file of images: say data.root=/path/to/images.zip")
        path = Path(root).expanduser()
        try:
            with zipfile.ZipFile(path) as file:
                infos = {info.filename: info for info in file.infolist() if _seen(info.filename)}
                images = sorted(name for name in infos if PurePosixPath(name).suffix.lower() in EXTENSIONS)
                told = [name for name in infos if PurePosixPath(name).name == LABEL_FILE]
                texts = {name: _text(file, name, path) for name in told if name.count("/") < 3}
        except (FileNotFoundError, IsADirectoryError) as error:
            fault = "is a folder, which data=image_folder reads" if path.is_dir() else "does not exist"
            raise OrnsteinError(f"data.root={root} {fault}: name a zip file of images") from error
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise OrnsteinError(f"data.root={root} cannot be read as a zip file ({error}): name another") from error
        if not images:
            raise OrnsteinError(f"data.root={root} holds no images (png, jpg, webp, bmp, gif or tiff): name another")
        base = _common(images + told)
        cut = len(base)
        return cls(
            path,
            base,
            {name[cut:]: infos[name] for name in images},
            {name[cut:].removesuffix(LABEL_FILE): text for name, text in texts.items()},
        )

    @cached_property
    def parts(self) -> dict[Split, str]:
        """The folder of each split, with its slash; empty where the splits are ours to make."""
        tops = {name.partition("/")[0] for name in self.images if "/" in name}
        val = next((name for name in VAL_FOLDERS if name in tops), None)
        if "train" not in tops or val is None:
            return {}
        found: dict[Split, str] = {"train": "train/", "val": f"{val}/"}
        return found | {"test": "test/"} if val != "test" and "test" in tops else found

    @property
    def given(self) -> bool:
        """Whether the zip file itself says what is train and what is val."""
        return bool(self.parts)

    def part(self, split: Split) -> str:
        """The folder that a split's images lie in. Raises NoSplit where the others have one and this has not."""
        if self.given and split not in self.parts:
            raise NoSplit(f"{self.path} has no folder named {split} beside train and {self.parts['val'].rstrip('/')}")
        return self.parts.get(split, "")

    def names(self, part: str) -> list[str]:
        """The images of a folder."""
        return [name for name in self.images if name.startswith(part)]

    def members(self, part: str) -> ZipMembers:
        """The same, to be read."""
        return ZipMembers(self.path, [self.images[name] for name in self.names(part)], base=self.base)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The classes: what `dataset.json` says of train, else the folders; empty for fewer than two folders."""
        train = self.parts.get("train", "")
        where = self._told(train)
        if where is not None:
            return read_class_names(self.texts[where], where=self._json(where))
        below = [name.removeprefix(train) for name in self.names(train)]
        names = sorted({name.partition("/")[0] for name in below if "/" in name})
        return tuple(names) if len(names) > 1 else ()

    def classes(self, part: str) -> np.ndarray:
        """The class of each image of a folder, int64 (N,)."""
        names, where = self.names(part), self._told(part)
        if where is not None:
            beside = self.names(where)
            labels = read_labels(
                self.texts[where], [name.removeprefix(where) for name in beside], where=self._json(where)
            )
            if labels is None or labels.max(initial=-1) >= len(self.class_names):
                raise OrnsteinError(f"{self._json(where)} has other classes than train's: give both the same")
            by_name = dict(zip(beside, labels.tolist(), strict=True))
            return np.array([by_name[name] for name in names], dtype=np.int64)
        number = {name: index for index, name in enumerate(self.class_names)}
        firsts = [name.removeprefix(part).partition("/")[0] for name in names]
        outside = [name for name, first in zip(names, firsts, strict=True) if first not in number]
        if outside:
            raise OrnsteinError(
                f"data.root={self.path}: {len(outside)} image(s) lie in no class folder of train's, "
                f"{', '.join(outside[:NAMED])} among them: add a {LABEL_FILE}, or set data.num_classes=null"
            )
        return np.array([number[first] for first in firsts], dtype=np.int64)

    def _told(self, part: str) -> str | None:
        """The folder of the `dataset.json` that holds for a part: its own, else the root's."""
        return next((folder for folder in (part, "") if folder in self.texts), None)

    def _json(self, folder: str) -> str:
        return f"{self.path}:{self.base}{folder}{LABEL_FILE}"


def _where(values: Sequence[Any], mask: np.ndarray) -> list[Any]:
    return [value for value, mine in zip(values, mask.tolist(), strict=True) if mine]


def _seen(name: str) -> bool:
    """Whether a member counts: no folder, nothing hidden, not the shadow tree of a Mac's zip."""
    parts = name.split("/")
    return not name.endswith("/") and not any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _text(file: zipfile.ZipFile, name: str, path: Path) -> str:
    try:
        return file.read(name).decode("utf-8-sig")
    except (UnicodeDecodeError, RuntimeError) as error:
        raise OrnsteinError(f"{path}:{name} is not text in UTF-8 ({error}): pack it anew") from error


def _common(names: Sequence[str]) -> str:
    """The folder that all members lie in, with its slash; "" where there is none, or where it is a split's name."""
    tops = {name.partition("/")[0] for name in names}
    loose = any("/" not in name for name in names)
    if loose or len(tops) != 1 or (top := next(iter(tops))) in ("train", *VAL_FOLDERS):
        return ""
    inner = {name.split("/")[1] for name in names if name.count("/") > 1}
    # A single class folder, or EDM's 00000, is no wrapping: there must be folders or a label file inside.
    return f"{top}/" if inner or f"{top}/{LABEL_FILE}" in names else ""
