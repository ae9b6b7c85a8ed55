"""Image files of any size as images of several shapes: sizes read from their heads, each bucket stored as one array."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ornstein.data.bad import Bad, BadImage
from ornstein.data.base import Images
from ornstein.data.bucketed import BucketedImages, bucketed
from ornstein.data.buckets import Shape
from ornstein.data.images import Crop, read_size
from ornstein.data.remembered import STAMP_BYTES, WORTH_KEEPING, recall, remember
from ornstein.data.stored import MEMORY_LIMIT, Sources, Storage, map_folder, stored
from ornstein.errors import OrnsteinError


class SomeOf:
    """Some of the sources, in an order."""

    def __init__(self, sources: Sources, rows: np.ndarray) -> None:
        self.sources, self.rows = sources, np.asarray(rows, dtype=np.int64)
        self.home = sources.home
        self.names = [sources.names[row] for row in self.rows.tolist()]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.rows)

    def __getitem__(self, row: int) -> Path | bytes:
        """What the whole has there."""
        return self.sources[int(self.rows[row])]

    def stamps(self) -> list[bytes]:
        """Those of the whole."""
        every = self.sources.stamps()
        return [every[row] for row in self.rows.tolist()]


def stored_somehow(
    storage: Storage,
    sources: Sources,
    shape: tuple[int, int, int, int],
    *,
    buckets: Sequence[Shape] | None,
    bad: Bad,
    crop: Crop = "adm",
) -> tuple[Images, np.ndarray]:
    """`stored`, or `stored_in_buckets` where there are buckets: of `shape` (N, C, H, W), H then is its image_size."""
    if buckets is None:
        return stored(storage, sources, shape, crop=crop, bad=bad)
    return stored_in_buckets(storage, sources, buckets, image_size=shape[2], channels=shape[1], crop=crop, bad=bad)


def stored_in_buckets(
    storage: Storage,
    sources: Sources,
    shapes: Sequence[Shape],
    *,
    image_size: int,
    channels: int,
    bad: Bad,
    crop: Crop = "adm",
) -> tuple[BucketedImages, np.ndarray]:
    """As `ornstein.data.stored.stored`, but each image resized to cover the shape nearest to its own, and cropped.

    Args:
        storage: of each bucket's array; "auto" goes by the size of all of them together.
        shapes: (height, width) each.
        image_size: stands for all shapes where one size is asked for.
        channels: 1 (grey) or 3 (RGB).
        bad: takes what cannot be read. The caller settles it.
        crop: how images come to their shapes.

    Returns:
        The images that were kept, and their rows among the sources, int64 (M,), rising.

    Raises:
        OrnsteinError: no room for a memory map, or a crop that makes squares.
    """
    check_crop(crop)
    sizes = read_sizes(sources, bad=bad)
    if storage == "auto":
        largest = max(height * width for height, width in shapes) * channels * len(sources)
        storage = "memory" if largest <= MEMORY_LIMIT else "mapped"

    def store(rows: np.ndarray, shape: tuple[int, int, int, int]) -> tuple[Images, np.ndarray]:
        return stored(storage, SomeOf(sources, rows), shape, crop=crop, bad=bad)

    return bucketed(sizes, shapes, store, image_size=image_size, channels=channels)


def check_crop(crop: str) -> None:
    """Refuse the crop that can make no other shape than a square (OrnsteinError)."""
    if crop == "edm_wide":
        raise OrnsteinError(
            "data.crop=edm_wide makes squares with black bars and data.buckets has other shapes: choose data.crop=adm, "
            "or data.buckets=null"
        )


def stored_alike(
    like: BucketedImages, storage: Storage, sources: Sources, *, channels: int, bad: Bad, crop: Crop = "adm"
) -> tuple[BucketedImages, np.ndarray]:
    """One more image for each of `like`, at the same shape whatever its own: what images are conditioned on.

    Args:
        like: N images in buckets.
        storage, channels, bad, crop: as of `stored_in_buckets`.
        sources: N of them.

    Returns:
        The images that were kept, and their rows among the sources.
    """
    shapes = np.array(like.shapes, dtype=np.int64)[like.bucket]

    def store(rows: np.ndarray, shape: tuple[int, int, int, int]) -> tuple[Images, np.ndarray]:
        return stored(storage, SomeOf(sources, rows), shape, crop=crop, bad=bad)

    # Of equal sizes the nearest shape is the shape itself.
    return bucketed(shapes, like.shapes, store, image_size=like.shape[2], channels=channels)


def read_sizes(sources: Sources, *, bad: Bad) -> np.ndarray:
    """Height and width of each image as it is shown, from the heads of the files alone: int64 (N, 2).

    One whose head cannot be read is noted in `bad` and has 0, 0. Sizes of many files are remembered in the cache
    folder, by the files' stamps.
    """
    name = hashlib.sha256(os.fsencode(os.path.abspath(sources.home))).hexdigest()[:24]
    place = map_folder() / f"sizes-{name}.npy"
    stamps = [hashlib.blake2b(stamp, digest_size=STAMP_BYTES).digest() for stamp in sources.stamps()]
    known = recall(place, width=8)

    def read(row: int) -> Shape:
        try:
            return read_size(sources[row], name=sources.names[row])
        except BadImage as error:
            bad.add(sources.names[row], error.reason)
            return (0, 0)

    unknown = [row for row, stamp in enumerate(stamps) if stamp not in known]
    with ThreadPoolExecutor() as pool:
        for row, size in zip(unknown, pool.map(read, unknown), strict=True):
            known[stamps[row]] = np.array(size, dtype="<u4").tobytes()
    if len(unknown) >= WORTH_KEEPING:
        remember(place, {stamp: size for stamp, size in known.items() if any(size)})
    return np.frombuffer(b"".join(known[stamp] for stamp in stamps), dtype="<u4").reshape(-1, 2).astype(np.int64)
