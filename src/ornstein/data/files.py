"""The files of a split, and what can be told of them without decoding any: whether they can be read, and hashes."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ornstein.data.bad import Bad
from ornstein.data.base import KEY_BYTES, NoSplit, Split
from ornstein.data.options import Crop
from ornstein.data.remembered import WORTH_KEEPING, recall, remember
from ornstein.data.splits import split_mask
from ornstein.data.stored import DECODING, Files, map_folder
from ornstein.errors import OrnsteinError

SPLIT_BYTES = 1 << 16
BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """The files of one split that can be opened, in order, and those of the other splits.

    `keys` is uint8 (N, 32): of each file the two keys of `readable_files`.
    """

    paths: list[Path]
    keys: np.ndarray
    others: list[Path]


def split_files(
    listed: Mapping[Split, Sequence[Path]],
    split: Split,
    *,
    root: Path,
    val_fraction: float,
    test_fraction: float = 0.0,
    bad: Bad,
) -> SplitFiles:
    """The files of a split.

    Args:
        listed: the files of each split; or all files under "train" alone, which are then split by content.
        root: what names are relative to.
        val_fraction, test_fraction: shares, where the split is ours.
        bad: takes the files that cannot be opened. Settled here where too few are left to split.

    Raises:
        NoSplit: there is no test split.
        OrnsteinError: no files.
    """
    given = len(listed) > 1
    if split == "test" and (split not in listed if given else test_fraction == 0):
        way_out = "add a folder test beside train and val" if given else "set data.test_fraction, to 0.1 say"
        raise NoSplit(f"data.root={root} has no test split: {way_out}")
    own = listed[split if given else "train"]
    if not own:
        of_split = f" for {split}" if given else ""
        raise OrnsteinError(
            f"data.root={root} holds no images{of_split} (png, jpg, webp, bmp, gif or tiff): name another data.root"
        )
    paths, keys = readable_files(own, base=root, bad=bad)
    if given:
        others = [path for other, files in listed.items() if other != split for path in files]
        return SplitFiles(paths=paths, keys=keys, others=others)
    split_keys = [key.tobytes() for key in keys[:, :KEY_BYTES]]
    if len(set(split_keys)) < 2:
        # Else a split would fail for want of images, which is not what is wrong.
        bad.settle()
    mask = split_mask(split_keys, split, val_fraction=val_fraction, test_fraction=test_fraction)
    return SplitFiles(
        paths=[paths[row] for row in np.flatnonzero(mask)],
        keys=keys[mask],
        others=[paths[row] for row in np.flatnonzero(~mask)],
    )


def content_of(crop: Crop, keys: np.ndarray) -> bytes:
    """What stands for the decoded images of files in a fingerprint: their split keys, and how they are decoded."""
    return (DECODING if crop == "adm" else f"{DECODING} {crop}").encode() + keys[:, :KEY_BYTES].tobytes()


def readable_files(paths: Sequence[Path], *, base: Path, bad: Bad) -> tuple[list[Path], np.ndarray]:
    """The files that can be opened and are not empty, in order, and two keys of 16 bytes for each, uint8 (N, 32).

    The first decides its split: equal for copies of a file, made of its size and beginning (unequal files with one key
    only share a side). The second is a hash of all of it, by which files of given splits are compared. Files are read
    once: the keys are kept in the cache folder for as long as a file's size and time stay.

    Args:
        paths: below `base`, which names them in messages.
        bad: takes those that cannot be read.
    """
    files = Files(paths, base=base)
    stamps = [hashlib.blake2b(stamp, digest_size=KEY_BYTES).digest() for stamp in files.stamps()]
    place = map_folder() / f"keys-{hashlib.sha256(os.fsencode(os.path.abspath(base))).hexdigest()[:24]}.npy"
    known = recall(place, width=2 * KEY_BYTES)

    def look(row: int) -> bytes | None:
        try:
            return known.get(stamps[row]) or _keys(paths[row])
        except OSError as error:
            reason = error.strerror or str(error)
            if isinstance(error, FileNotFoundError):
                reason = "it is a broken link" if paths[row].is_symlink() else "there is no such file"
            bad.add(files.names[row], reason)
        return None

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(look, range(len(paths))))
    news = {stamp: key for stamp, key in zip(stamps, found, strict=True) if key is not None and stamp not in known}
    if len(news) >= WORTH_KEEPING:
        remember(place, known | news)
    kept = [row for row, key in enumerate(found) if key is not None]
    keys = np.frombuffer(b"".join(key for key in found if key is not None), dtype=np.uint8)
    return [paths[row] for row in kept], keys.reshape(-1, 2 * KEY_BYTES)


def _keys(path: Path) -> bytes:
    """Both keys of a file. Raises OSError, also for what is empty or no regular file."""
    if not path.is_file():
        # A pipe would be waited on for ever.
        path.stat()
        raise OSError("it is no regular file")
    size = path.stat().st_size
    if size == 0:
        raise OSError("the file is empty")
    split = hashlib.blake2b(str(size).encode(), digest_size=KEY_BYTES)
    whole = hashlib.blake2b(digest_size=KEY_BYTES)
    with path.open("rb") as file:
        beginning = file.read(SPLIT_BYTES)
        split.update(beginning)
        whole.update(beginning)
        while block := file.read(BLOCK):
            whole.update(block)
    return split.digest() + whole.digest()
