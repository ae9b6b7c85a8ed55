"""Any folder of images: decoded once, into memory or a memory map, or every time where disk is short."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from ornstein.data.base import ImageDataset, Images, Split, checked_split
from ornstein.data.captions import check_template, from_classes, from_files
from ornstein.data.describe import EXTENSIONS, class_names, find_root, image_files, parts_of
from ornstein.data.fetch import cache_dir
from ornstein.data.images import check_channels, check_size, load_image
from ornstein.data.splits import content_key, val_mask
from ornstein.errors import OrnsteinError

Storage = Literal["auto", "memory", "mapped", "lazy"]
STORAGES: tuple[Storage, ...] = ("auto", "memory", "mapped", "lazy")
MEMORY_LIMIT = 1 << 28
KEY_BYTES = 1 << 16
NAMED = 10
BAR_FROM = 2000
# Part of the name of every memory map: a change of the decoding must not find maps of before.
DECODING = "1"


class ImageFolder(ImageDataset):
    """All images below a folder: png, jpg, webp, bmp, gif (first frame), tiff.

    Classes are the names of the root's sub-folders, where there are at least two. Sub-folders `train` and
    `val` (or `valid`, `validation`, `test`) are taken as the splits; otherwise the images are split by
    content, so that a file and its copy stay on one side.

    Args:
        split: "train" or "val".
        root: the folder.
        image_size: side of the square that `ornstein.data.images.center_square` makes of every image.
        channels: 3 (RGB) or 1 (grey).
        val_fraction: share of the images held out, where the folder does not say itself.
        labels: False leaves the classes out, True takes them if there are any.
        storage: "memory" holds uint8 arrays; "mapped" decodes once into a file in the cache folder and maps
            it, which any number of processes share; "lazy" decodes at every access (use `num_workers`);
            "auto" is "memory" up to 256 MB, "mapped" above.
        caption_files: captions from text files beside the images, `cat.txt` for `cat.png`.
        caption_template: captions from the classes' names, `{}` being their place; None leaves captions out.
        condition_root: a folder with one more image for each of these (a depth map, edges) at the same place
            below it and of the same name, whatever its extension; cropped and resized alike.
        condition_channels: of those, 1 (grey) or 3 (RGB).

    Raises:
        OrnsteinError: no folder, no images, images that cannot be read (the first ten are named), images
            outside the class folders, images without caption file or condition, or no room on the disk.
    """

    def __init__(
        self,
        *,
        split: str,
        root: str | None,
        image_size: int = 64,
        channels: int = 3,
        val_fraction: float = 0.1,
        labels: bool = True,
        storage: str = "auto",
        caption_files: bool = False,
        caption_template: str | None = None,
        condition_root: str | None = None,
        condition_channels: int = 1,
    ) -> None:
        chosen = checked_split(split)
        check_size(image_size, name="image_folder")
        check_channels(channels)
        check_channels(condition_channels, key="condition_channels")
        check_template(caption_template)
        if caption_files and caption_template is not None:
            raise OrnsteinError("data.caption_files=true and data.caption_template both make captions: leave one out")
        folder = find_root(root)
        names = class_names(folder) if labels else ()
        base, paths, keys = _split_files(folder, chosen, val_fraction)
        shape = (len(paths), channels, image_size, image_size)
        classes = _labels(base, paths, names) if names else None
        way = _checked_storage(storage)
        conditions = None
        if condition_root is not None:
            partners = _partners(paths, folder, condition_root)
            conditions = _stored(way, partners, (len(paths), condition_channels, image_size, image_size))
        super().__init__(
            _stored(way, paths, shape),
            name="image_folder",
            split=chosen,
            labels=classes,
            class_names=names,
            captions=from_files(paths) if caption_files else from_classes(caption_template, classes, names),
            conditions=conditions,
            content=DECODING.encode() + b"".join(keys),
        )
        self.paths = paths


class LazyImages:
    """Image files that index like an array (N, C, H, W) and decode on the way out."""

    def __init__(self, paths: Sequence[Path], shape: tuple[int, ...]) -> None:
        self.paths = paths
        self.shape = shape

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Decode the files at `rows`, (B,) or (B, 1...): uint8 (B, C, H, W)."""
        _, channels, size, _ = self.shape
        decoded = [load_image(self.paths[row], size=size, channels=channels) for row in np.ravel(rows).tolist()]
        return np.stack(decoded) if decoded else np.empty((0, *self.shape[1:]), dtype=np.uint8)


class MappedImages:
    """A read-only memory map of a .npy file that indexes like an array; worker processes open it anew.

    A numpy memory map would be pickled as its whole content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = np.load(path, mmap_mode="r")
        self.shape: tuple[int, ...] = self._map.shape

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Copy rows out: uint8 (B, C, H, W)."""
        return np.asarray(self._map[rows])

    def __reduce__(self) -> tuple[type["MappedImages"], tuple[Path]]:
        """Pickle the path alone."""
        return MappedImages, (self.path,)


def _checked_storage(storage: str) -> Storage:
    """`storage` itself, or an error that names what there is."""
    for known in STORAGES:
        if storage == known:
            return known
    raise OrnsteinError(f"data.storage={storage} does not exist: choose one of {', '.join(STORAGES)}")


def _split_files(root: Path, split: Split, val_fraction: float) -> tuple[Path, list[Path], list[bytes]]:
    """The folder that a split's class folders lie in, the split's files in order, and their content keys."""
    parts = parts_of(root)
    base = parts.val if split == "val" else parts.train
    paths = list(image_files(base))
    if not paths:
        raise OrnsteinError(f"{base} holds no images (png, jpg, webp, bmp, gif or tiff): name another data.root")
    empty = [path for path in paths if path.stat().st_size == 0]
    if empty:
        raise OrnsteinError(_unreadable(base, [f"{path.relative_to(base)}: the file is empty" for path in empty]))
    with ThreadPoolExecutor() as pool:
        keys = list(pool.map(_file_key, paths))
    if parts.given:
        return base, paths, keys
    held_out = val_mask(keys, val_fraction)
    rows = np.flatnonzero(held_out == (split == "val")).tolist()
    return base, [paths[row] for row in rows], [keys[row] for row in rows]


def _file_key(path: Path) -> bytes:
    """Equal for copies of a file. Reads its beginning alone: unequal files with one key only share a side."""
    with path.open("rb") as file:
        return content_key(str(path.stat().st_size).encode() + file.read(KEY_BYTES))


def _labels(base: Path, paths: Sequence[Path], names: Sequence[str]) -> np.ndarray:
    """The class of every file by the first folder on its way: int64 (N,)."""
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


def _stored(storage: Storage, paths: list[Path], shape: tuple[int, ...]) -> Images:
    """The images of the files in the way that was asked for."""
    if storage == "lazy":
        return LazyImages(paths, shape)
    size = int(np.prod(shape, dtype=np.int64))
    if storage == "memory" or (storage == "auto" and size <= MEMORY_LIMIT):
        images = np.empty(shape, dtype=np.uint8)
        _decode_into(images, paths)
        return images
    return _mapped(paths, shape)


def _decode_into(images: np.ndarray, paths: Sequence[Path]) -> None:
    """Decode all files into the rows of an array; a progress bar where there are many."""
    from rich.console import Console
    from rich.progress import Progress

    _, channels, size, _ = images.shape

    def decode(row: int) -> str | None:
        try:
            images[row] = load_image(paths[row], size=size, channels=channels)
        except OrnsteinError as error:
            return str(error)
        return None

    faults: list[str] = []
    console = Console(stderr=True)
    quiet = len(paths) < BAR_FROM or not console.is_terminal
    # Pillow decodes and resizes outside the interpreter's lock, so threads do.
    with ThreadPoolExecutor() as pool, Progress(console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("decoding images", total=len(paths))
        rows = iter(range(len(paths)))
        while block := list(islice(rows, 256)):
            faults.extend(fault for fault in pool.map(decode, block) if fault is not None)
            progress.advance(task, len(block))
    if faults:
        raise OrnsteinError(_unreadable(Path(os.path.commonpath(paths)), faults))


def _unreadable(folder: Path, faults: Sequence[str]) -> str:
    """The sentence about files that cannot be read, the first ten by name."""
    more = f", and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    listed = "; ".join(faults[:NAMED])
    return f"{len(faults)} image(s) below {folder} cannot be read ({listed}{more}): repair or remove them"


def _mapped(paths: list[Path], shape: tuple[int, ...]) -> MappedImages:
    """The images as a read-only memory map of a file in the cache folder, made if it is not there.

    Its name is a digest of the files' paths, sizes and times and of how they are decoded; it appears whole or
    not at all.
    """
    digest = hashlib.sha256(repr((DECODING, shape)).encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    target = cache_dir() / "image_folder" / f"{digest.hexdigest()[:32]}.npy"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        needed, free = int(np.prod(shape, dtype=np.int64)), shutil.disk_usage(target.parent).free
        if needed > free:
            raise OrnsteinError(
                f"{needed >> 20} MB of decoded images do not fit into the {free >> 20} MB free at "
                f"{target.parent}: set XDG_CACHE_HOME to a larger disk, or data.storage=lazy"
            )
        handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
        os.close(handle)
        try:
            images = np.lib.format.open_memmap(name, mode="w+", dtype=np.uint8, shape=shape)
            _decode_into(images, paths)
            images.flush()
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)
    return MappedImages(target)
