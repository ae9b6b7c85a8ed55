"""What a data set is, before it is loaded: the facts that `conf/data/*.yaml` writes down.

`python -m ornstein.data.describe FOLDER` prints them for a folder of images. Importing this module costs
neither torch nor Pillow, so that a config can be completed and checked at once.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ornstein.errors import OrnsteinError

if TYPE_CHECKING:
    import numpy as np

    from ornstein.data.base import ImageDataset

NAMED = 10
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
VAL_FOLDERS = ("val", "valid", "validation", "test")
LABEL_FILE = "dataset.json"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The folders whose images make up each split: the same one twice where the split is ours to make.

    `test` is None where there is none beside val's.
    """

    train: Path
    val: Path
    test: Path | None = None

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
    """`train` and one of `val`, `valid`, `validation`, `test` below the root, or the root for both.

    `test` is a split of its own where one of the others is val's.
    """
    train, test = root / "train", root / "test"
    for name in VAL_FOLDERS:
        if train.is_dir() and (root / name).is_dir():
            apart = name != test.name and test.is_dir()
            return Parts(train=train, val=root / name, test=test if apart else None)
    return Parts(train=root, val=root)


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders with an image somewhere below them, sorted: the classes, if two or more."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and _seen(entry.name))
    return [name for name in names if next(image_files(folder / name), None) is not None]


def image_files(folder: Path) -> Iterator[Path]:
    """Every image file below a folder by its extension, sorted, hidden files and folders left out.

    Links are followed, but for those to a folder that they lie in. Raises OrnsteinError for a folder that cannot be
    read: its images would be missing without a word.
    """
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        folders[:] = sorted(name for name in folders if _seen(name) and not _leads_back(place, name))
        for name in sorted(files):
            if _seen(name) and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield Path(place) / name


def _refuse(error: OSError) -> None:
    raise OrnsteinError(f"{error.filename} cannot be read ({error.strerror}): allow it, or take it away") from error


def _leads_back(place: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in, so that following it would never end."""
    path = os.path.join(place, name)
    if not os.path.islink(path):
        return False
    target = os.path.join(os.path.realpath(path), "")
    return os.path.join(os.path.realpath(place), "").startswith(target)


def _seen(name: str) -> bool:
    """Whether a file or folder counts: not hidden, and not the shadow tree of a Mac's zip."""
    return not name.startswith(".") and name != "__MACOSX"


def class_names(root: str | os.PathLike[str] | None) -> tuple[str, ...]:
    """The classes of a folder of images: what its `dataset.json` says, else the names of its sub-folders.

    Of `train`'s, where it has splits. Empty where there are fewer than two sub-folders (one wrapping folder is no
    class), or where `dataset.json` says null. Raises OrnsteinError without a folder, and for a wrong file.
    """
    folder = find_root(root)
    train = parts_of(folder).train
    told = label_file(train, folder)
    if told is not None:
        return read_class_names(read_text(told), where=str(told))
    names = class_folders(train)
    return tuple(names) if len(names) > 1 else ()


def count_classes(root: str | os.PathLike[str] | None) -> int | None:
    """How many classes a folder of images has, or None: what `data.num_classes=auto` stands for.

    Reads `dataset.json` or folder names only. Raises OrnsteinError without a folder, and for a wrong file.
    """
    return len(class_names(root)) or None


def label_file(part: Path, root: Path) -> Path | None:
    """The `dataset.json` that holds for a part of a folder: its own, else the root's, else None."""
    return next((path for path in (part / LABEL_FILE, root / LABEL_FILE) if path.is_file()), None)


def read_text(path: Path) -> str:
    """A text file in UTF-8, or one sentence on why it cannot be read (OrnsteinError)."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise OrnsteinError(f"{path} is not text in UTF-8 ({error.reason}, byte {error.start}): save it so") from error
    except OSError as error:
        raise OrnsteinError(f"{path} cannot be read ({error.strerror or error})") from error


def read_labels(text: str, names: Sequence[str], *, where: str) -> "np.ndarray | None":
    """The classes of some images, from a `dataset.json` as EDM and StyleGAN write it: int64 (N,), in their order.

    Args:
        text: of the file: ``{"labels": [["00000/img00000000.png", 6], ...]}``, or null for no labels, which gives
            None. Our own addition: ``"class_names": [...]``.
        names: of all images beside the file, relative to it, with forward slashes.
        where: the file, as messages should call it.

    Raises:
        OrnsteinError: the text is not of that form, a label is no number from 0 on or skips some, an image is missing
            among the labels, or a label names no image.
    """
    import numpy as np

    labels = _parsed(text, where)[0]
    if labels is None:
        return None
    missing = [name for name in names if name not in labels]
    if missing:
        raise OrnsteinError(f"{where} has no label for {_listed(missing, len(names))}: add them")
    extra = sorted(labels.keys() - set(names))
    if extra:
        raise OrnsteinError(f"{where} labels images that are not there, {_listed(extra, len(labels))}: remove those")
    return np.array([labels[name] for name in names], dtype=np.int64)


def read_class_names(text: str, *, where: str) -> tuple[str, ...]:
    """The classes of such a `dataset.json`: its `class_names`, else "0" to "K-1"; () where its labels are null.

    Raises OrnsteinError as `read_labels` does for a text that is not of that form.
    """
    return _parsed(text, where)[1]


def _parsed(text: str, where: str) -> tuple[dict[str, int] | None, tuple[str, ...]]:
    """The label of each image and the classes' names, checked for themselves; (None, ()) without labels."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise OrnsteinError(f"{where} is no JSON ({error}): repair it, or remove it to go without labels") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise OrnsteinError(
            f'{where} does not look like {{"labels": [["folder/image.png", 0], ...]}}: write it so, or rename it'
        )
    entries = content["labels"]
    if entries is None:
        return None, ()
    labels: dict[str, int] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise OrnsteinError(f'{where}: label {number} is {entry!r:.80} where ["image.png", 0] belongs')
        name, label = entry[0].replace("\\", "/").removeprefix("./"), entry[1]
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise OrnsteinError(f"{where}: the label of {name} is {label!r:.80}; classes are whole numbers from 0 on")
        if labels.setdefault(name, label) != label:
            raise OrnsteinError(f"{where} labels {name} twice, {labels[name]} and {label}: remove one")
    return labels, _named_classes(content.get("class_names"), set(labels.values()), where)


def _named_classes(names: object, used: set[int], where: str) -> tuple[str, ...]:
    """One name a class; without names no class may be skipped, since their number is all that says how many."""
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise OrnsteinError(f"{where}: class_names is {names!r:.80} where a list of names belongs")
        if max(used, default=-1) >= len(names):
            raise OrnsteinError(f"{where} has {len(names)} class_names and a label {max(used)}: they count from 0")
        return tuple(names)
    skipped = sorted(set(range(min(max(used, default=-1), len(used)) + 1)) - used)
    if skipped:
        raise OrnsteinError(
            f"{where} has a label {max(used)} and none of {skipped[0]}: number classes from 0 without gaps, or list "
            "all their class_names there"
        )
    return tuple(str(label) for label in range(len(used)))


def _listed(names: Sequence[str], total: int) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} of {total} ({', '.join(names[:NAMED])}{more})"


def measure_sigma_data(dataset: "ImageDataset", *, limit: int = 4096) -> float:
    """Standard deviation of x in [-1, 1] over all pixels of at most `limit` images, evenly spaced.

    The `sigma_data` of Karras et al. 2022 (arXiv 2206.00364), one number for all channels.
    """
    import numpy as np

    from ornstein.data.base import chunk_rows

    rows = np.unique(np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(np.int64))
    count, total, squares = 0, 0.0, 0.0
    for piece in dataset.pieces(size=chunk_rows(dataset.images.shape), rows=rows):
        x = dataset.images[piece].astype(np.float64) / 127.5 - 1
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
    given = [part.name for part in (parts.train, parts.val, parts.test) if part is not None]
    print(f"splits: {', '.join(given) if parts.given else 'made by val_fraction'}")
    print(f"num_classes: {len(names) or 'null'}")
    print(f"class_names: {list(names) or 'null'}")


if __name__ == "__main__":
    main()
