"""Published data sets that are folders of classes: AFHQ and ImageNet."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ornstein.data.base import SPLITS, Split, checked_split
from ornstein.data.captions import from_classes
from ornstein.data.describe import class_folders, image_files
from ornstein.data.fetch import announce, unzip
from ornstein.data.fetch import download as bring
from ornstein.data.published import PublishedImages, Some, check_zip, find, key_list, source_keys
from ornstein.data.splits import official_part, official_rows
from ornstein.data.stored import Files
from ornstein.errors import OrnsteinError

# The addresses of the makers' download.sh; they have published no checksums.
AFHQ_ADDRESS = {
    "v1": "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1",
    "v2": "https://www.dropbox.com/s/vkzjokiwof5h8w6/afhq_v2.zip?dl=1",
}
AFHQ_HELD_OUT = {"v1": "val", "v2": "test"}
IMAGENET_TARS = {"train": "ILSVRC2012_img_train.tar", "test": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SYNSETS = "LOC_synset_mapping.txt"


class ClassFolders(PublishedImages):
    """A data set published as two folders, each with one folder a class.

    Args:
        split: "train", "val" or "test".
        name: of the data set.
        train, held_out: the folders; `held_out` may be None where `val_from` is "train" and test is not asked for.
        folders: the class folders in the order of their labels; class_names: what messages and captions call them.
        image_size, channels, crop, storage, max_bad: as of `PublishedImages`.
        labels: False leaves the classes out.
        caption_template: captions from the classes' names, `{}` being their place; None leaves captions out.
        val_from: "test": val is what was published as test (or validation), and there is no test split. "train": val
            is a share of train, by content within each class, and test is the published one.
        val_fraction: that share.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS

    def __init__(
        self,
        *,
        split: str,
        name: str,
        train: Path,
        held_out: Path | None,
        folders: Sequence[str],
        class_names: Sequence[str],
        image_size: int,
        channels: int,
        crop: str,
        labels: bool,
        storage: str,
        max_bad: int,
        caption_template: str | None,
        val_from: str,
        val_fraction: float,
    ) -> None:
        chosen = checked_split(split, self.splits)
        part = train if official_part(chosen, val_from, name=name) == "train" else held_out
        if part is None:
            raise OrnsteinError(
                f"{train.parent} holds no images of {name} apart from {train.name}: add those that were published for "
                "validation, or set data.val_from=train to hold out a share of train"
            )
        paths, classes = _members(part, folders, name=name)
        sources: Files | Some = Files(paths, base=part)
        keys = source_keys(sources)
        rows = official_rows(
            lambda: key_list(keys), chosen, val_from, val_fraction=val_fraction, groups=classes.tolist()
        )
        if rows is not None:
            sources, keys, classes = Some(sources, rows), keys[rows], classes[rows]
        super().__init__(
            sources,
            keys=keys,
            name=name,
            split=chosen,
            labels=classes if labels else None,
            class_names=class_names,
            captions=from_classes(caption_template, classes, class_names),
            image_size=image_size,
            channels=channels,
            crop=crop,
            storage=storage,
            max_bad=max_bad,
        )


class AFHQ(ClassFolders):
    """Animal Faces HQ (Choi et al. 2020, arXiv 1912.01865): cats, dogs and wild animals at 512 x 512.

    About 15,000 photographs, of which about 500 of each class are held out: in `val` of version 1 and in `test` of
    version 2, the same photographs resampled with more care. One version is no test of the other. EDM's figures
    (arXiv 2206.00364, 64 x 64) are of version 2, trained on and compared with both parts together. The licence is
    non-commercial.

    Args:
        split, image_size, channels, crop, labels, storage, max_bad, caption_template, val_from, val_fraction: as of
            `ClassFolders`.
        root: the folder that holds `train` and `val` (version 1) or `test` (version 2), or the folder `afhq` that does;
            None looks in `ornstein.data.fetch.places`.
        version: "v1" or "v2".
        download: fetch the zip where it is not found (into `root` if given).

    Raises:
        OrnsteinError: no such folders, or damaged images.
    """

    CLASSES = ("cat", "dog", "wild")

    def __init__(
        self,
        *,
        split: str,
        image_size: int = 64,
        channels: int = 3,
        crop: str = "adm",
        root: str | None = None,
        version: str = "v2",
        download: bool = True,
        labels: bool = True,
        storage: str = "auto",
        max_bad: int = 0,
        caption_template: str | None = None,
        val_from: str = "test",
        val_fraction: float = 0.1,
    ) -> None:
        if version not in AFHQ_ADDRESS:
            raise OrnsteinError(f"data.version={version} does not exist: choose one of {', '.join(AFHQ_ADDRESS)}")
        held_out = AFHQ_HELD_OUT[version]
        url = AFHQ_ADDRESS[version]
        inner = "afhq" if version == "v1" else "afhq_v2"

        def seek(folder: Path) -> Path | None:
            for place in (folder, folder / inner):
                if all((place / part / name).is_dir() for part in ("train", held_out) for name in self.CLASSES):
                    return place
            return None

        def fetch(home: Path) -> None:
            archive = home / f"{inner}.zip"
            bring([url], archive, sha256=None, check=check_zip)
            unzip(archive, home / inner if version == "v2" else home)
            archive.unlink()

        folder = find(
            "afhq",
            root,
            seek=seek,
            fetch=fetch if download else None,
            what=f"AFHQ {version} (7 GB) from {url}",
            how=(
                f"Unpack {url} so that {{home}}/{inner} holds train and {held_out}, each with the folders "
                f"{', '.join(self.CLASSES)}"
            ),
            needed=15_000_000_000,
        )
        super().__init__(
            split=split,
            name=f"afhq_{version}",
            train=folder / "train",
            held_out=folder / held_out,
            folders=self.CLASSES,
            class_names=self.CLASSES,
            image_size=image_size,
            channels=channels,
            crop=crop,
            labels=labels,
            storage=storage,
            max_bad=max_bad,
            caption_template=caption_template,
            val_from=val_from,
            val_fraction=val_fraction,
        )


class ImageNet(ClassFolders):
    """ImageNet 2012 (Russakovsky et al. 2015, arXiv 1409.0575): 1,281,167 train and 50,000 validation images.

    Val is the published validation set, whose labels are public; the published test set's are not. Published FIDs are
    against train (ADM's and EDM's reference statistics), precision and recall against 10,000 of its images. Classes are
    the folders (synsets) in alphabetical order, the order that everybody's class numbers go by; a folder of fewer than
    the thousand is served too. Handed out after registration only: never fetched.

    Args:
        split, image_size, channels, crop, labels, storage, max_bad, caption_template, val_from, val_fraction: as of
            `ClassFolders`.
        root: the folder that holds `train` and `val` with a folder for each synset, also in Kaggle's
            `ILSVRC/Data/CLS-LOC`; or the published tars, which are then unpacked there. None looks in
            `ornstein.data.fetch.places`. Names come from torchvision's table for all thousand classes, else from
            `LOC_synset_mapping.txt` in the root, else they are the synsets.

    Raises:
        OrnsteinError: no such folders, validation images that lie in no class folder, or damaged images.
    """

    def __init__(
        self,
        *,
        split: str,
        image_size: int = 64,
        channels: int = 3,
        crop: str = "adm",
        root: str | None = None,
        labels: bool = True,
        storage: str = "auto",
        max_bad: int = 0,
        caption_template: str | None = None,
        val_from: str = "test",
        val_fraction: float = 0.01,
    ) -> None:
        folder = _imagenet(root)
        synsets = class_folders(folder / "train")
        if len(synsets) < 2:
            raise OrnsteinError(f"{folder / 'train'} has no folder for each synset (n01440764 the first): unpack it so")
        held_out = folder / "val"
        super().__init__(
            split=split,
            name="imagenet",
            train=folder / "train",
            held_out=held_out if held_out.is_dir() else None,
            folders=synsets,
            class_names=synset_names(synsets, folder),
            image_size=image_size,
            channels=channels,
            crop=crop,
            labels=labels,
            storage=storage,
            max_bad=max_bad,
            caption_template=caption_template,
            val_from=val_from,
            val_fraction=val_fraction,
        )

    @classmethod
    def count_classes(cls, options: Mapping[str, Any]) -> int | None:
        """What `data.num_classes=auto` stands for: the synsets that are there."""
        return len(class_folders(_imagenet(options.get("root")) / "train"))


def synset_names(synsets: Sequence[str], folder: Path) -> tuple[str, ...]:
    """What the classes are called, no two alike."""
    listed = next((place / SYNSETS for place in (folder, *folder.parents[:3]) if (place / SYNSETS).is_file()), None)
    if len(synsets) == 1000:
        from torchvision.models._meta import _IMAGENET_CATEGORIES

        return tuple(_IMAGENET_CATEGORIES)
    if listed is None:
        return tuple(synsets)
    lines = (line.split(" ", 1) for line in listed.read_text(encoding="utf-8").splitlines())
    told = {words[0]: words[1].split(",")[0].strip() for words in lines if len(words) == 2}
    names = [told.get(synset, synset) for synset in synsets]
    return tuple(name if names.count(name) == 1 else synset for name, synset in zip(names, synsets, strict=True))


def _imagenet(root: str | None) -> Path:
    """The folder that holds `train`."""

    def seek(folder: Path) -> Path | None:
        for place in (folder, folder / "ILSVRC" / "Data" / "CLS-LOC", folder / "Data" / "CLS-LOC"):
            if (place / "train").is_dir():
                return place
        if not (folder / IMAGENET_TARS["train"]).is_file():
            return None
        unpack_imagenet(folder)
        return folder

    return find(
        "imagenet",
        root,
        seek=seek,
        fetch=None,
        what="",
        how=(
            "It is handed out after registration: fetch "
            f"{', '.join((*IMAGENET_TARS.values(), DEVKIT))} from https://image-net.org/download-images into {{home}}, "
            "or make {home}/train and {home}/val with a folder for each synset"
        ),
    )


def unpack_imagenet(folder: Path) -> None:
    """Train (and val, where its tar and the devkit are there) from the published tars, through torchvision.

    Each folder appears once it is whole. Raises OrnsteinError for damaged tars.
    """
    from torchvision.datasets import imagenet

    announce("images of ImageNet's tars", folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as scratch:
            if (folder / IMAGENET_TARS["test"]).is_file() and (folder / DEVKIT).is_file():
                imagenet.parse_devkit_archive(str(folder))
                imagenet.parse_val_archive(str(folder), folder=f"{scratch}/val")
                (Path(scratch) / "val").rename(folder / "val")
            imagenet.parse_train_archive(str(folder), folder=f"{scratch}/train")
            (Path(scratch) / "train").rename(folder / "train")
    except (RuntimeError, OSError) as error:
        raise OrnsteinError(f"ImageNet's tars in {folder} cannot be unpacked ({error})") from error


def _members(part: Path, folders: Sequence[str], *, name: str) -> tuple[list[Path], np.ndarray]:
    """The images of the class folders in order, and the class of each, int64 (N,)."""
    loose = next((path for path in part.iterdir() if path.suffix.lower() in (".jpeg", ".jpg", ".png")), None)
    if loose is not None:
        raise OrnsteinError(
            f"{loose} lies in no class folder: move the images of {part} into a folder for each class (of ImageNet's "
            f"validation set: put {IMAGENET_TARS['test']} and {DEVKIT} beside train's tar, and they are sorted)"
            if name == "imagenet"
            else f"{loose} lies in no class folder: unpack {name} again"
        )
    unknown = sorted(set(class_folders(part)) - set(folders))
    if unknown:
        raise OrnsteinError(f"{part} has classes that train has not ({', '.join(unknown[:10])}): remove them")
    paths, classes = [], []
    for label, folder in enumerate(folders):
        own = list(image_files(part / folder))
        paths += own
        classes += [label] * len(own)
    if not paths:
        raise OrnsteinError(f"{part} holds no images of {name}: unpack it again")
    return paths, np.array(classes, dtype=np.int64)
