"""What a data set is, before it is loaded: the facts that `conf/data/*.yaml` writes down.

`python -m ornstein.data.describe FOLDER` prints them for a folder of images. Importing this module costs
neither torch nor Pillow, so that a config can be completed and checked at once.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    from ornstein.data.base import ImageDataset

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
VAL_FOLDERS = ("val", "valid", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The folders whose images make up each split: the same one twice where the split is ours to make."""

    train: Path
    val: Path

    @property
    def given(self) -> bool:
        """Whether the folder itself says what is train and what is val."""
        return self.train != self.val


def find_root(root: str | os.PathLike[str] | None) -> Path:
    """The folder that `data.root` names, or one sentence on what is wrong with it."""
    if root is None:
        raise OrnsteinError("data=image_folder needs a folder of images: say data.root=/path/to/images")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        fault = "is a file, not a folder" if folder.exists() else "does not exist"
        raise OrnsteinError(f"data.root={folder} {fault}: name a folder of images")
    return folder


def parts_of(root: Path) -> Parts:
    """`train` and one of `val`, `valid`, `validation`, `test` below the root, or the root for both."""
    train = root / "train"
    for name in VAL_FOLDERS:
        if train.is_dir() and (root / name).is_dir():
            return Parts(train=train, val=root / name)
    return Parts(train=root, val=root)


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders with an image somewhere below them, sorted: the classes, if two or more."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and _seen(entry.name))
    return [name for name in names if next(image_files(folder / name), None) is not None]


def image_files(folder: Path) -> Iterator[Path]:
    """Every image file below a folder by its extension, sorted, hidden files and folders left out."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if _seen(name))
        for name in sorted(files):
            if _seen(name) and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield Path(place) / name


def _seen(name: str) -> bool:
    """Whether a file or folder counts: not hidden, and not the shadow tree of a Mac's zip."""
    return not name.startswith(".") and name != "__MACOSX"


def class_names(root: str | os.PathLike[str] | None) -> tuple[str, ...]:
    """The classes of a folder of images: names of its sub-folders (of `train`'s, where it has splits).

    Empty where there are fewer than two: one wrapping folder is no class. Raises OrnsteinError without a
    folder.
    """
    names = class_folders(parts_of(find_root(root)).train)
    return tuple(names) if len(names) > 1 else ()


def count_classes(root: str | os.PathLike[str] | None) -> int | None:
    """How many classes a folder of images has, or None: what `data.num_classes=auto` stands for.

    Reads folder names only. Raises OrnsteinError without a folder.
    """
    return len(class_names(root)) or None


def measure_sigma_data(dataset: "ImageDataset", *, limit: int = 4096) -> float:
    """Standard deviation of x in [-1, 1] over all pixels of at most `limit` images, evenly spaced.

    The `sigma_data` of Karras et al. 2022 (arXiv 2206.00364), one number for all channels.
    """
    import numpy as np

    from ornstein.data.base import row_chunks

    rows = np.unique(np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(np.int64))
    count, total, squares = 0, 0.0, 0.0
    for chunk in row_chunks((len(rows), *dataset.images.shape[1:])):
        x = dataset.images[rows[chunk]].astype(np.float64) / 127.5 - 1
        count, total, squares = count + x.size, total + x.sum(), squares + np.square(x).sum()
    return float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))


def main() -> None:
    """Print the facts of the folder named on the command line."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m ornstein.data.describe FOLDER")
    try:
        root = find_root(sys.argv[1])
        names = class_names(root)
    except OrnsteinError as error:
        raise SystemExit(str(error)) from error
    parts = parts_of(root)
    print(f"images: {sum(1 for _ in image_files(root))}")
    print(f"splits: {f'{parts.train.name}, {parts.val.name}' if parts.given else 'made by val_fraction'}")
    print(f"num_classes: {len(names) or 'null'}")
    print(f"class_names: {list(names) or 'null'}")


if __name__ == "__main__":
    main()
